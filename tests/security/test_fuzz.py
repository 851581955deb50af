"""Hundreds of mutated inputs for each reader: every one is read, or refused with one clear line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pemt.bank.entries import read_bank, read_entry, write_entry
from pemt.bank.tools import verify
from pemt.checkpoint import TrainState, train_state_of
from pemt.checkpoint.checkpoint import CheckpointError
from pemt.config import AdaptConfig, PemtError
from pemt.config.deepspeed import fill_deepspeed_json, read_deepspeed_json
from pemt.config.parse import parse_config
from pemt.engine.deepspeed_schema import check_schema
from pemt.model import base_shape
from pemt.storage.manifest import MANIFEST, read_manifest, sha256, with_checksum
from pemt.tasks.task_file import load_task_file
from tests.conftest import ROOT
from tests.security.fuzzing import mutated_tensors, mutated_text, mutated_values, read_or_refused
from tests.support.tiny import adapt_config
from tests.support.tiny_t5 import tiny_base, tiny_source

SHAPE = base_shape(tiny_base().config)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    for kind in ("lora", "bottleneck"):
        base = {"name": "t5-tiny", **SHAPE}
        given = {"description": "Fuzzed.", "metrics": {"accuracy": 50.0}}
        write_entry(tmp_path, tiny_source(kind, kind), base=base, **given)
    return tmp_path


def test_manifest_bytes(bank: Path) -> None:
    def read(text: bytes) -> None:
        (bank / "lora" / MANIFEST).write_bytes(text)
        read_entry(bank / "lora")

    original = (bank / "lora" / MANIFEST).read_text()
    read_or_refused(mutated_text([original]), read, at_least=0)


def test_bank_whose_manifest_is_sealed_anew(bank: Path) -> None:
    """As somebody would who wants a lie to pass: behind the seal every value is still looked at."""
    entry = bank / "bottleneck"

    def read(manifest: dict[str, Any]) -> None:
        (entry / MANIFEST).write_text(with_checksum(manifest))
        read_bank(bank, base_shape=SHAPE, base_name="t5-tiny", tasks=["bottleneck"])
        fault = verify(bank, ["bottleneck"])["bottleneck"]
        if fault:
            raise PemtError(fault)

    read_or_refused(mutated_values(read_manifest(entry)), read)


def test_bank_whose_tensors_are_sealed_anew(bank: Path) -> None:
    """Broken safetensors under a manifest that knows their checksum."""
    path, manifest = bank / "lora" / "expert.safetensors", read_manifest(bank / "lora")

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        manifest["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (path.parent / MANIFEST).write_text(with_checksum(manifest))
        read_entry(path.parent)

    read_or_refused(mutated_tensors(path.read_bytes()), read, at_least=0)


def test_progress_of_a_checkpoint() -> None:
    def read(manifest: dict[str, Any]) -> None:
        found = train_state_of(manifest)
        if not isinstance(found.measured(3.0, 1.0), TrainState) or found.step < 0:
            raise CheckpointError("a progress of that kind was let through")

    original = {"progress": asdict(TrainState(step=5, best_metric=71.5, best_step=4))}
    read_or_refused(mutated_values(original), read)


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
    path = tmp_path / "task.yaml"

    def read(text: bytes) -> None:
        path.write_bytes(text)
        load_task_file(path)

    read_or_refused(mutated_text([TASK]), read)


@pytest.mark.slow
def test_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    own = "model_name_or_path: a\noutput_dir: b\ntask_name: c\nbank_dir: d\n"
    more = "source_tasks: [x, y]\nmixture: {prompt_dropout: 0.2}\npeft_config: null\nlearning_rate: 3.0e-3\n"

    def read(text: bytes) -> None:
        path.write_bytes(text)
        parse_config(AdaptConfig, ["--config", str(path)], prog="pemt adapt")

    read_or_refused(mutated_text([own + more]), read)


def test_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    config = adapt_config(tmp_path, tmp_path, tmp_path, tmp_path, "task")
    originals = [
        (ROOT / "ds_configs" / f"{name}.json").read_text() for name in ("zero2", "zero3_offload")
    ]

    def read(content: Any) -> None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        content = read_deepspeed_json(path)
        check_schema(fill_deepspeed_json(content, config, world_size=2, path=path), path)

    changed = st.one_of(mutated_text(originals), mutated_values(json.loads(originals[1])))
    read_or_refused(changed, read)
    assert os.listdir(tmp_path) == ["ds.json"]
