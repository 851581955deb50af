"""A DeepSpeed JSON's inner keys are held against DeepSpeed's own schema, in one line; and what needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pemt.config.deepspeed import DeepSpeedConfigError, fill_deepspeed_json, read_deepspeed_json
from pemt.engine import Engine
from pemt.engine.deepspeed_schema import check_schema
from pemt.engine.launcher import EngineError, check_world_size
from tests.config.test_ds_configs import FILES, filled
from tests.conftest import ROOT, Launch
from tests.support.ranks import deepspeed_json
from tests.support.tiny import adapt_config

ZERO = "zero_optimization"
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "misspelt": (
        {ZERO: {"overlap_com": True}},
        [f"unknown key `{ZERO}.overlap_com`", f"`{ZERO}.overlap_comm`"],
    ),
    "misspelt alias": (
        {ZERO: {"stage3_param_persistance_threshold": 0}},
        ["stage3_param_persistence_threshold"],
    ),
    "misspelt, deeper": (
        {ZERO: {"offload_optimizer": {"device": "cpu", "pin_memry": True}}},
        [f"`{ZERO}.offload_optimizer.pin_memry`", f"`{ZERO}.offload_optimizer.pin_memory`"],
    ),
    "text for a number": (
        {ZERO: {"reduce_bucket_size": "5000000"}},
        ['found "5000000"', "integer"],
    ),
    "truth for a number": ({ZERO: {"reduce_bucket_size": True}}, ["found true", "integer"]),
    "number for a truth": ({ZERO: {"overlap_comm": 1}}, ["overlap_comm: found 1", "boolean"]),
    "out of range": ({ZERO: {"reduce_bucket_size": 0}}, ["reduce_bucket_size", "greater than 0"]),
    "no such device": (
        {ZERO: {"offload_optimizer": {"device": "disk"}}},
        ["offload_optimizer.device", '"disk"', "'cpu'"],
    ),
    "not an object": ({ZERO: {"offload_param": "cpu"}}, ["offload_param", "expected an object"]),
    "auto that stays": ({ZERO: {"reduce_bucket_size": "auto"}}, ["reduce_bucket_size", '"auto"']),
    "values that do not go together": (
        {ZERO: {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        [ZERO, "Partial offloading only supported for ZeRO Stage 3"],
    ),
    "frozen weights in int8": (
        {ZERO: {"zero_quantized_nontrainable_weights": True}},
        ["zero_quantized_nontrainable_weights: found true, allowed is false", "DeepSpeed 0.19"],
    ),
    "precision": ({"fp16": {"loss_scal": 0}}, ["`fp16.loss_scal`", "`fp16.loss_scale`"]),
    "an optimizer": ({"optimizer": {"type": "AdamW"}}, ["optimizer: pemt", "remove the section"]),
    "a schedule": ({"scheduler": {"type": "WarmupLR"}}, ["scheduler: pemt", "lr_scheduler_type"]),
    "plain section": ({"aio": {"blok_size": 1}}, ["`aio.blok_size`", "`aio.block_size`"]),
}


def checked(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    content[ZERO] = {"stage": 2, **content.get(ZERO, {})}
    path.write_text(json.dumps(content))
    config = adapt_config(tmp_path, tmp_path, tmp_path, tmp_path, "t")
    check_schema(
        fill_deepspeed_json(read_deepspeed_json(path), config, world_size=2, path=path), path
    )


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_file_key_and_what_is_allowed(name: str, tmp_path: Path) -> None:
    content, parts = CASES[name]
    with pytest.raises(DeepSpeedConfigError) as caught:
        checked(content, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'ds.json'}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "fine",
    [
        {"reduce_bucket_size": 5e8},
        {"stage3_max_live_parameters": 1e9, "sub_group_size": 1000},
        {"param_persistence_threshold": 0},  # the field's own name, beside its alias
        {"offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme"}},
        {"offload_optimizer": None},
    ],
    ids=lambda fine: next(iter(fine)),
)
def test_what_deepspeed_takes_is_taken(fine: dict[str, Any], tmp_path: Path) -> None:
    checked({ZERO: fine}, tmp_path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_of_this_project_pass(path: Path) -> None:
    check_schema(filled(path), path)


def test_a_run_stops_at_a_misspelt_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(DeepSpeedConfigError, match=r"overlap_com`; did you mean .*overlap_comm"):
        Engine(adapt_config(tmp_path, tmp_path, tmp_path, tmp_path, "t"))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "8"}, "SLURM_STEP_NUM_TASKS is 4"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2"),
    ],
)
def test_copies_that_srun_or_mpirun_started_are_refused(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=named):
        check_world_size(1)
    monkeypatch.setenv("WORLD_SIZE", "1")  # a launcher stands between them and us
    check_world_size(1)


def test_one_process_of_an_allocation_may_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_world_size(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_quantised_zero3_takes_steps(tmp_path: Path, launch: Launch) -> None:
    """Not run so far: the quantisers are CUDA operators. On one GPU there is no second copy (hpZ)."""
    gpus = torch.cuda.device_count()
    path = deepspeed_json(tmp_path, "zero3_quantized", zero_hpz_partition_size=gpus)
    told = launch("-m", "pemt.engine.probe", zero=path, num_processes=gpus).output
    assert f"probe: {gpus} rank(s), ZeRO-3, cuda" in told


@pytest.mark.soak
@pytest.mark.launch
@pytest.mark.slow
def test_quantised_zero3_gathers_what_it_was_given(tmp_path: Path, launch: Launch) -> None:
    """All but the CUDA operators: these are written in torch here."""
    zero = deepspeed_json(tmp_path, "zero3_quantized", zero_hpz_partition_size=2)
    launch("-m", "tests.launch.launched_quantized", str(tmp_path), zero=zero)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["second_copies"] == 2, "of the frozen weight and bias"
    assert found["quantised"] > 0
    assert found["largest"] > 1
    for error in found["errors"]:
        assert 0 < error < 0.02
    assert found["losses"] == sorted(found["losses"], reverse=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_nvme_offload_takes_steps(tmp_path: Path, launch: Launch) -> None:
    """Not run so far: DeepSpeed's asynchronous file operators want a GPU's pinned memory."""
    content = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text())
    for section in ("offload_optimizer", "offload_param"):
        content[ZERO][section] = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": True}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    assert "ZeRO-3" in launch("-m", "pemt.engine.probe", zero=path, num_processes=1).output
