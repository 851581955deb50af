"""Hundreds of mutated inputs for each reader: every one is read, or refused with one clear line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from pemt.bank.entries import read_bank, read_entry
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
from tests.security.fuzzing import Outcomes, fuzz, mutated_tensors, mutated_text, mutated_values
from tests.support.tiny import adapt_config
from tests.support.tiny_t5 import tiny_base, tiny_source


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pemt.bank.entries import write_entry

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
        (entry / MANIFEST).write_text(with_checksum(manifest))
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

    @fuzz
    @given(mutated_tensors(whole))
    def run(changed: bytes) -> None:
        path.write_bytes(changed)
        manifest["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
        (entry / MANIFEST).write_text(with_checksum(manifest))
        outcomes.of(lambda: read_entry(entry))

    run()
    path.write_bytes(whole)
    (entry / MANIFEST).write_text(text)
    outcomes.check(at_least=0)


def test_progress_of_a_checkpoint() -> None:
    outcomes = Outcomes()
    original = {"progress": asdict(TrainState(step=5, best_metric=71.5, best_step=4))}

    @fuzz
    @given(mutated_values(original))
    def run(manifest: dict[str, Any]) -> None:
        def use() -> None:
            found = train_state_of(manifest)
            if not isinstance(found.measured(3.0, 1.0), TrainState) or found.step < 0:
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
