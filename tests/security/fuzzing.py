"""What the fuzz tests share: mutations of text, JSON and safetensors, and what may come of reading them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st

from pemt.config import PemtError

INPUTS = int(os.environ.get("PEMT_FUZZ_INPUTS", "100"))  # `make soak`: 1000

# What readers stumble over.
ODD_VALUES: list[Any] = [None, True, -1, 0, 2**63, 2**60, 1e400, float("nan"), 1e-300]
ODD_VALUES += ["", "..", "../../etc/passwd", "/etc/passwd", "\x00", "\ud800", "a" * 5000]
ODD_VALUES += ["{", "%s{x}", "1e3", "null", "yes", "٣", "-", "~", "float32"]
ODD_VALUES += [[], {}, [[]], {"": {}}, [1, 2], {"a": 1}]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(ODD_VALUES), st.integers(), st.floats(), st.text(max_size=8)
)
TOKENS = [":", "\n", "  ", "- ", "{", "}", "[", "]", '"', "'", "&a ", "*a"]
TOKENS += ["!!python/object:os.system ", "!!int ", "!!timestamp ", "2001-99-99", "<<: "]
TOKENS += ["? ", "#", "---", "...", "\t", "\x00", "\ufeff"]
TOKENS += ["1" * 5000, "[" * 3000, "{a: " * 1500, "é", ".inf", "0x"]
TOKENS += ["1_000", "!!binary ", "%YAML 9", "|", ">"]


@st.composite
def mutated_text(draw: st.DrawFn, originals: list[str]) -> bytes:
    """One of the originals after up to four edits: text put in, taken out, doubled, or bytes broken."""
    text = draw(st.sampled_from(originals)).encode()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        till = min(len(text), at + draw(st.integers(0, 30)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            put = draw(st.sampled_from(TOKENS)).encode("utf-8")
            text = text[:at] + put + text[at:]
        elif kind == 1:
            text = text[:at] + text[till:]
        elif kind == 2:
            text = text[:till] + text[at:]
        elif kind == 3:
            text = text[:at] + draw(st.binary(max_size=4)) + text[till:]
        else:
            text = text[:at]
    return text


@st.composite
def mutated_values(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """The JSON after up to three edits of its values: another, one less, one more."""
    content = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        places: list[tuple[Any, Any]] = []
        collect(content, places)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.integers(0, 3))
        if kind <= 1:
            holder[key] = deepcopy(draw(ODD))
        elif kind == 2:
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = deepcopy(draw(ODD))
        else:
            holder.append(deepcopy(draw(ODD)))
    return content


def collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            collect(value[key], places)


def read_or_refused(
    inputs: st.SearchStrategy[Any], read: Callable[[Any], object], *, at_least: int = 1
) -> None:
    """Every input is read, or refused with a PemtError of one line; anything else fails the test.

    Args:
        at_least: so many are to be read, and more than a quarter refused, or the mutations show nothing.
    """
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=INPUTS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(content: Any) -> None:
        try:
            read(content)
        except PemtError as error:
            told = str(error)
        else:
            outcomes["read"] += 1
            return
        assert len(told.splitlines()) == 1, repr(told)
        assert 10 < len(told) < 2000, f"{len(told)} characters"
        told.encode("utf-8")
        outcomes["refused"] += 1

    run()
    print(dict(outcomes))
    assert outcomes.total() >= INPUTS
    assert outcomes["refused"] > INPUTS // 4
    assert outcomes["read"] >= at_least


def mutated_tensors(whole: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header, or the length that stands before it, is another."""
    size = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + size].decode(), whole[8 + size :]

    def put_together(changed: Any, how: int) -> bytes:
        raw = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        length = len(raw) if how else 2 ** (20 + 13 * (len(raw) % 4))
        return length.to_bytes(8, "little") + raw + data

    headers = st.one_of(mutated_text([header]), mutated_values(json.loads(header)))
    return st.builds(put_together, headers, st.integers(0, 3))
