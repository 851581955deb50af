"""A thousand mutated inputs for each reader: every one is read, or refused with one clear line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pemt.arguments import parse_config
from pemt.bank import read_bank, read_entry
from pemt.bank_tools import verify
from pemt.checkpoint import CheckpointError, Progress, progress_of
from pemt.config import AdaptConfig, PemtError
from pemt.deepspeed_json import fill_deepspeed_json, read_deepspeed_json
from pemt.engine.schema import check_schema
from pemt.manifest import MANIFEST, read_manifest, sealed, sha256
from pemt.model import base_shape
from pemt.tasks.task_file import load_task_file
from tests.conftest import ROOT
from tests.tiny import adapt_config
from tests.tiny_t5 import tiny_base, tiny_source

INPUTS = 1000
fuzz = settings(
    max_examples=INPUTS,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

# What readers stumble over.
ODD_VALUES: list[Any] = [None, True, -1, 0, 2**63, 2**60, 1e400, float("nan"), 1e-300]
ODD_VALUES += [
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "a" * 5000,
    "{",
    "%s{x}",
]
ODD_VALUES += [
    [],
    {},
    [[]],
    {"": {}},
    [1, 2],
    {"a": 1},
    "1e3",
    "null",
    "yes",
    "٣",
    "-",
    "~",
    "float32",
]
ODD: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(ODD_VALUES), st.integers(), st.floats(), st.text(max_size=8)
)
TOKENS = [
    ":",
    "\n",
    "  ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "&a ",
    "*a",
    "!!python/object:os.system ",
]
TOKENS += [
    "!!int ",
    "!!timestamp ",
    "2001-99-99",
    "<<: ",
    "? ",
    "#",
    "---",
    "...",
    "\t",
    "\x00",
    "\ufeff",
]
TOKENS += [
    "1" * 5000,
    "[" * 3000,
    "{a: " * 1500,
    "é",
    ".inf",
    "0x",
    "1_000",
    "!!binary ",
    "%YAML 9",
    "|",
    ">",
]


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


class Outcomes:
    """Runs a reader; anything but success and a PemtError of one line fails the test."""

    def __init__(self) -> None:
        self.read = self.refused = 0

    def of(self, reader: Callable[[], Any]) -> None:
        try:
            reader()
        except PemtError as error:
            told = str(error)
        else:
            self.read += 1
            return
        assert len(told.splitlines()) == 1, repr(told)
        assert 10 < len(told) < 2000, f"{len(told)} characters"
        told.encode("utf-8")
        self.refused += 1

    def check(self, *, at_least: int = 1) -> None:
        """Both outcomes have come up, or the mutations show nothing."""
        print(f"{self.read} read, {self.refused} refused")
        assert self.read + self.refused >= INPUTS
        assert self.refused > INPUTS // 4
        assert self.read >= at_least


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pemt.bank import write_entry

    shape = base_shape(tiny_base().config)
    folder = tmp_path_factory.mktemp("fuzz") / "bank"
    for kind in ("lora", "bottleneck"):
        source = tiny_source(kind, kind)
        write_entry(
            folder,
            source,
            base={"name": "t5-tiny", **shape},
            description="Fuzzed.",
            metrics={"accuracy": 50.0},
        )
    return folder


def test_manifest_bytes(bank: Path) -> None:
    outcomes, entry = Outcomes(), bank / "lora"
    original = (entry / MANIFEST).read_text()

    @fuzz
    @given(mutated_text([original]))
    def run(text: bytes) -> None:
        (entry / MANIFEST).write_bytes(text)
        outcomes.of(lambda: read_entry(entry))

    run()
    (entry / MANIFEST).write_text(original)
    outcomes.check(at_least=0)


def test_bank_whose_manifest_is_sealed_anew(bank: Path) -> None:
    """As somebody would who wants a lie to pass: behind the seal every value is still looked at."""
    outcomes, entry = Outcomes(), bank / "bottleneck"
    original, text = read_manifest(entry), (entry / MANIFEST).read_text()
    shape = base_shape(tiny_base().config)

    def use() -> None:
        read_bank(bank, base_shape=shape, base_name="t5-tiny", tasks=["bottleneck"])
        fault = verify(bank, ["bottleneck"])["bottleneck"]
        if fault:
            raise PemtError(fault)

    @fuzz
    @given(mutated_values(original))
    def run(manifest: dict[str, Any]) -> None:
        (entry / MANIFEST).write_text(sealed(manifest))
        outcomes.of(use)

    run()
    (entry / MANIFEST).write_text(text)
    outcomes.check()


def test_bank_whose_tensors_are_sealed_anew(bank: Path) -> None:
    """Broken safetensors under a manifest that knows their checksum."""
    outcomes, entry = Outcomes(), bank / "lora"
    path, manifest, text = (
        entry / "expert.safetensors",
        read_manifest(entry),
        (entry / MANIFEST).read_text(),
    )
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + size].decode(), whole[8 + size :]

    @fuzz
    @given(st.one_of(mutated_text([header]), mutated_values(json.loads(header))), st.integers(0, 3))
    def run(changed: Any, how: int) -> None:
        raw = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        length = len(raw) if how else 2 ** (20 + 13 * (len(raw) % 4))
        path.write_bytes(length.to_bytes(8, "little") + raw + data)
        manifest["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (entry / MANIFEST).write_text(sealed(manifest))
        outcomes.of(lambda: read_entry(entry))

    run()
    path.write_bytes(whole)
    (entry / MANIFEST).write_text(text)
    outcomes.check(at_least=0)


def test_progress_of_a_checkpoint() -> None:
    outcomes = Outcomes()
    original = {"progress": asdict(Progress(step=5, best_metric=71.5, best_step=4))}

    @fuzz
    @given(mutated_values(original))
    def run(manifest: dict[str, Any]) -> None:
        def use() -> None:
            found = progress_of(manifest)
            if not isinstance(found.measured(3.0), Progress) or found.step < 0:
                raise CheckpointError("a progress of that kind was let through")

        outcomes.of(use)

    run()
    outcomes.check()


TASK = """name: tickets
description: Decide which team a support ticket belongs to.
template: "subject: {subject} text: {body}"
label: team
labels: [billing, network, other]
metrics: [accuracy, macro_f1]
max_target_length: 8
aliases: {subject: title}
files: {train: train.csv, validation: dev.csv}
"""


def test_task_yaml(tmp_path: Path) -> None:
    outcomes, path = Outcomes(), tmp_path / "task.yaml"

    @fuzz
    @given(mutated_text([TASK]))
    def run(text: bytes) -> None:
        path.write_bytes(text)
        outcomes.of(lambda: load_task_file(path))

    run()
    outcomes.check()


@pytest.mark.slow
def test_configuration(tmp_path: Path) -> None:
    outcomes, path = Outcomes(), tmp_path / "run.yaml"
    own = "model_name_or_path: a\noutput_dir: b\ntask_name: c\nbank_dir: d\n"
    more = "source_tasks: [x, y]\nmixture: {prompt_dropout: 0.2}\npeft_config: null\nlearning_rate: 3.0e-3\n"

    @fuzz
    @given(mutated_text([own + more]))
    def run(text: bytes) -> None:
        path.write_bytes(text)
        outcomes.of(lambda: parse_config(AdaptConfig, ["--config", str(path)], prog="pemt adapt"))

    run()
    outcomes.check()


def test_deepspeed_json(tmp_path: Path) -> None:
    outcomes, path = Outcomes(), tmp_path / "ds.json"
    config = adapt_config(tmp_path, tmp_path, tmp_path, tmp_path, "task")
    originals = [
        (ROOT / "ds_configs" / f"{name}.json").read_text() for name in ("zero2", "zero3_offload")
    ]

    def use() -> None:
        content = read_deepspeed_json(path)
        check_schema(fill_deepspeed_json(content, config, world_size=2, path=path), path)

    changed = st.one_of(mutated_text(originals), mutated_values(json.loads(originals[1])))

    @fuzz
    @given(changed)
    def run(content: Any) -> None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        outcomes.of(use)

    run()
    outcomes.check()
    assert os.listdir(tmp_path) == ["ds.json"]
