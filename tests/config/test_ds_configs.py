"""ds_configs/: DeepSpeed's own schema takes every file, and our reader takes them too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from pemt.config.deepspeed import fill_deepspeed_json, read_deepspeed_json
from pemt.config.schema import SourceConfig
from tests.conftest import ROOT

FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def filled(path: Path) -> dict[str, Any]:
    config = SourceConfig(
        model_name_or_path="m", output_dir="o", task_name="t", bank_dir="b", bf16=True
    )
    return fill_deepspeed_json(read_deepspeed_json(path), config, world_size=1, path=path)


def test_the_files_are_the_ones_promised() -> None:
    assert {path.stem for path in FILES} == {
        *("zero0", "zero1", "zero2", "zero3"),
        *("zero2_offload", "zero3_offload", "zero3_quantized"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_takes_the_file_as_it_stands(path: Path) -> None:
    content = filled(path)
    theirs = DeepSpeedConfig(copy.deepcopy(content))
    assert theirs.zero_optimization_stage == int(path.stem[4])
    for key, value in content["zero_optimization"].items():
        found = getattr(theirs.zero_config, key)
        if isinstance(value, dict):
            found = {name: getattr(found, name) for name in value}
        assert found == value, key
    offload = theirs.zero_config.offload_optimizer
    assert (offload is not None) == path.stem.endswith("_offload")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_misspelt_zero_key_is_refused_by_the_schema(path: Path) -> None:
    content = filled(path)
    content["zero_optimization"]["overlap_com"] = True
    with pytest.raises(ValueError, match="overlap_com"):
        DeepSpeedConfig(content)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_run_decides_what_the_run_knows(path: Path) -> None:
    content = json.loads(path.read_text())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ):
        assert content[key] == "auto"
    assert content["gradient_clipping"] == "auto"
    assert content["bf16"] == content["fp16"] == {"enabled": "auto"}
    # accelerate refuses a torch optimizer beside one of these
    assert "optimizer" not in content
    assert "scheduler" not in content


def test_the_readme_tells_when_to_choose_each() -> None:
    rows = (ROOT / "ds_configs" / "README.md").read_text()
    for path in FILES:
        assert f"| `{path.name}` |" in rows
