"""Hundreds of mutations of each file of an adapter that comes from a stranger, ours and PEFT's."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pemt.bank.peft_format import read_base_name, read_peft, write_peft
from pemt.config import PemtError
from pemt.model import PemtT5, base_digest, base_shape
from pemt.publish.adapter_format import (
    CONFIG,
    FORMAT,
    TENSORS,
    Settings,
    SourceSettings,
    read_model,
    read_settings,
    write_adapter,
)
from tests.security.fuzzing import mutated_tensors, mutated_values, read_or_refused
from tests.support.tiny_t5 import target_model, tiny_base, tiny_source, tiny_sources

SHAPE = base_shape(tiny_base().config)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An adaptation of the tiny base over three LoRA experts."""
    sources, model = tiny_sources(), target_model()
    settings = Settings(
        format=FORMAT,
        method="pemt",
        base_model_name_or_path="t5-tiny",
        base_sha256=base_digest(tiny_base()),
        tokenizer_name=None,
        task_name="cb",
        template="text: {text}",
        labels=["yes", "no"],
        max_source_length=16,
        max_new_tokens=4,
        num_beams=1,
        reduction_factor=4,
        train_layer_norms=True,
        sources=[
            SourceSettings(name=each.name, kind=each.kind, rank=each.rank, alpha=each.alpha)
            for each in sources
        ],
        dtype="float32",
    )
    trained = dict(model.trainable_parameters())
    write_adapter(tmp_path, settings, trained=trained, experts=sources)
    model, _ = read_model(tmp_path, settings, tiny_base())
    assert isinstance(model, PemtT5)
    return tmp_path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA in PEFT's format, with patterns."""
    folder = write_peft(tmp_path / "adapter", tiny_source(), base_name="t5-tiny", shape=SHAPE)
    content = json.loads((folder / CONFIG).read_text())
    content |= {"rank_pattern": {"decoder.*wo": 4}, "alpha_pattern": {"encoder.*wo": 2.5}}
    (folder / CONFIG).write_text(json.dumps(content))
    read_peft(folder, SHAPE)
    return folder


def test_settings_of_a_published_adapter(published: Path) -> None:
    base = tiny_base()

    def read(content: dict[str, Any]) -> None:
        (published / CONFIG).write_text(json.dumps(content))
        read_model(published, read_settings(published), deepcopy(base))

    read_or_refused(mutated_values(json.loads((published / CONFIG).read_text())), read)


def test_tensors_of_a_published_adapter(published: Path) -> None:
    base, settings = tiny_base(), read_settings(published)

    def read(content: bytes) -> None:
        (published / TENSORS).write_bytes(content)
        read_model(published, settings, deepcopy(base))

    read_or_refused(mutated_tensors((published / TENSORS).read_bytes()), read, at_least=0)


def test_configuration_of_a_peft_adapter(adapter: Path) -> None:
    def read(content: dict[str, Any]) -> None:
        (adapter / CONFIG).write_text(json.dumps(content))
        assert isinstance(read_base_name(adapter), str | None)
        read_peft(adapter, SHAPE)

    read_or_refused(mutated_values(json.loads((adapter / CONFIG).read_text())), read)


def test_tensors_of_a_peft_adapter(adapter: Path) -> None:
    def read(content: bytes) -> None:
        (adapter / TENSORS).write_bytes(content)
        read_peft(adapter, SHAPE)

    read_or_refused(mutated_tensors((adapter / TENSORS).read_bytes()), read, at_least=0)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("max_source_length", "x", 'max_source_length: found "x", it should be a valid integer'),
        ("num_beams", 0, "num_beams: found 0, it should be greater than or equal to 1"),
        ("reduction_factor", 0, "reduction_factor: found 0, it should be greater"),
        ("tokenizer_name", 7, "tokenizer_name: found 7, it should be a valid string"),
        ("train_layer_norms", "no", 'train_layer_norms: found "no", it should be a valid boolean'),
        ("labels", "yes", 'labels: found "yes", it should be a valid array'),
        ("sources", [{"name": "a"}], r"sources\.0\.kind: missing"),
        ("dtype", "int8", 'dtype: found "int8", it should be .float32'),
        ("max_new_tokens", 2**80, "max_new_tokens: found 12089"),
    ],
)
def test_a_value_of_another_kind_is_told(published: Path, key: str, value: Any, told: str) -> None:
    content = json.loads((published / CONFIG).read_text()) | {key: value}
    (published / CONFIG).write_text(json.dumps(content))
    with pytest.raises(PemtError, match=told) as refused:
        read_settings(published)
    assert str(refused.value).endswith("; export the run again")
