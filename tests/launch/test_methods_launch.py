"""Every baseline on the one trainer: one plain process, and two ranks under ZeRO-3; in `make soak` ZeRO-2 too."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pemt.config.schema import AdaptConfig, RunConfig
from pemt.run.finished import load_finished
from pemt.sweep.plan import read_sweep
from tests.conftest import launch_ranks
from tests.launch.launched_methods import METHODS, RESUMED, RESUMED_STEP, RUN, SHARED, SWEEP, TASK
from tests.support.ranks import deepspeed_json
from tests.support.tiny import losses, make_base, run_fields, tiny_task, write_task_files

ROOT = Path(__file__).parents[2]
SWEPT, SWEPT_METHODS = "zero3", ["bitfit", "lora"]
ROUNDING = 2e-6  # sums over micro-batches are taken in another order

pytestmark = [pytest.mark.launch, pytest.mark.slow]
FolderOf = Callable[[str, str], Path]


def launched(name: str, *method: str) -> Any:
    """ZeRO-2 trains these as it does PEMT, which test_launch.py has."""
    return pytest.param(name, *method, marks=pytest.mark.soak if name == "zero2" else ())


PAIRS = [
    *(launched(name, method) for name, methods in RUN.items() for method in methods),
    *((SWEPT, method) for method in SWEPT_METHODS),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    make_base(folder / "base", num_layers=1)
    tiny_task(TASK)
    write_task_files(folder / TASK, seed=0)
    write_sweep(folder, folder / SWEPT)
    return folder


@pytest.fixture(scope="module")
def folder_of(world: Path) -> FolderOf:
    """A method's run in a launch, which is started when it is first asked for."""

    @cache
    def started(name: str) -> Path:
        program = ("-m", "tests.launch.launched_methods", str(world), str(world / name))
        launch_ranks(*program, zero=None if name == "plain" else deepspeed_json(world, name))
        return world / name

    def of(name: str, method: str) -> Path:
        if name == SWEPT and method in SWEPT_METHODS:
            return started(name) / "sweep" / TASK / method / f"seed-{RunConfig.seed}"
        return started(name) / method

    return of


def write_sweep(world: Path, folder: Path) -> None:
    """Two of METHODS once more, as a sweep's runs."""
    fields = {**run_fields(world / "base", world / TASK, folder, TASK), **SHARED}
    for resolve_config in ("output_dir", "task_name"):
        del fields[resolve_config]
    content = {
        "output_dir": str(folder / "sweep"),
        "fields": fields,
        "methods": {name: METHODS[name] for name in SWEPT_METHODS},
        "tasks": [TASK],
        "seeds": [RunConfig.seed],
    }
    folder.mkdir()
    (folder / SWEEP).write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_losses_agree(folder_of: FolderOf, name: str, method: str) -> None:
    ours, reference = losses(folder_of(name, method)), losses(folder_of("plain", method))
    assert len(ours) == 5
    assert len(set(ours.values())) == 5, "a loss that never changes shows nothing"
    if method == "full-bf16":  # autocast here, bf16 weights there: alike, not equal
        assert ours == pytest.approx(reference, rel=0.05)
    else:
        assert ours == pytest.approx(reference, rel=ROUNDING)


@pytest.mark.parametrize(
    ("name", "method"),
    [launched(name, method) for name, each in RESUMED.items() for method in each],
)
def test_resume_is_bit_for_bit(folder_of: FolderOf, name: str, method: str) -> None:
    resumed, whole = losses(folder_of(name, f"{method}-resumed")), losses(folder_of(name, method))
    assert resumed == {step: whole[step] for step in (RESUMED_STEP + 1, RESUMED_STEP + 2)}


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_what_is_trained(folder_of: FolderOf, name: str, method: str) -> None:
    manifest = json.loads((folder_of(name, method) / "checkpoint-5" / "manifest.json").read_text())
    listed = manifest["files"]["trained.safetensors"]["tensors"]
    trained = {name: tensor["shape"] for name, tensor in listed.items()}
    assert trained == EXPECTED[method.removesuffix("-bf16")]


@pytest.mark.parametrize("name", [launched(name) for name in RUN])
def test_results_and_logs_are_those_of_every_run(folder_of: FolderOf, name: str) -> None:
    for method in RUN[name]:
        results: dict[str, Any] = json.loads(
            (folder_of(name, method) / "all_results.json").read_text()
        )
        assert results["sources"] == []
        assert results["gates"] == {}
        assert not any("moe_weight" in key for key in results)
        plain = json.loads((folder_of("plain", method) / "all_results.json").read_text())
        if method != "full-bf16":
            for key in ("test_accuracy", "test_average_metrics", "test_loss"):
                assert results[key] == pytest.approx(plain[key], rel=1e-5)
        logged = (folder_of(name, method) / "log.jsonl").read_text()
        assert "train/sparsity_loss" not in logged
        assert "gate/" not in logged


def test_a_sweep_on_two_ranks_trains_its_runs_and_writes_its_table(
    world: Path, folder_of: FolderOf
) -> None:
    folder = folder_of(SWEPT, SWEPT_METHODS[0]).parents[2]
    table = (folder / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == [f"| {name}" for name in SWEPT_METHODS]
    for name in SWEPT_METHODS:
        run = folder_of(SWEPT, name)
        alone = losses(folder_of("plain", name))
        assert losses(run) == pytest.approx(alone, rel=ROUNDING), "not as the same run by itself"
        score = json.loads((run / "all_results.json").read_text())["test_average_metrics"]
        assert f"{score:.1f}" in table[2 + SWEPT_METHODS.index(name)]
    sweep = read_sweep(world / SWEPT / SWEEP)
    assert all(run.finished for run in sweep.runs)


@pytest.mark.parametrize("method", ["full", "bitfit", "lora", "prompt"])
def test_a_finished_run_is_taken_up_again(folder_of: FolderOf, method: str) -> None:
    finished = load_finished(folder_of("zero3", method))
    assert isinstance(finished.config, AdaptConfig)
    assert finished.config.method == METHODS[method]["method"]
    assert finished.source_names == []


ATTENTIONS = [
    "encoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
]
FFNS = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]
NORMS = [
    f"{stack}.block.0.layer.{layer}.layer_norm"
    for stack, layers in (("encoder", 2), ("decoder", 3))
    for layer in range(layers)
] + ["encoder.final_layer_norm", "decoder.final_layer_norm"]
D, F, INNER, VOCABULARY, HEADS = 16, 33, 8, 32, 2
RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
EXPECTED: dict[str, dict[str, list[int]]] = {
    "full": {
        "base.shared.weight": [VOCABULARY, D],
        **{f"base.{site}.{side}.weight": [INNER, D] for site in ATTENTIONS for side in "qkv"},
        **{f"base.{site}.o.weight": [D, INNER] for site in ATTENTIONS},
        **{f"base.{stack}.{RELATIVE}": [32, HEADS] for stack in ("encoder", "decoder")},
        **{f"base.{site}.wi.weight": [F, D] for site in FFNS},
        **{f"base.{site}.wo.weight": [D, F] for site in FFNS},
        **{f"base.{site}.weight": [D] for site in NORMS},
    },
    "bitfit": {
        "base.lm_head.bias": [VOCABULARY],
        **{f"base.{site}.{side}.bias": [INNER] for site in ATTENTIONS for side in "qkv"},
        **{f"base.{site}.o.bias": [D] for site in ATTENTIONS},
        **{f"base.{site}.wi.bias": [F] for site in FFNS},
        **{f"base.{site}.wo.bias": [D] for site in FFNS},
        **{f"base.{site}.bias": [D] for site in NORMS},
    },
    "lora": {
        f"peft.base_model.model.{site}.{side}.lora_{factor}.default.weight": shape
        for site in ATTENTIONS
        for side in "qv"
        for factor, shape in (("A", [3, D]), ("B", [INNER, 3]))
    },
    "prompt": {"peft.prompt_encoder.default.embedding.weight": [5, D]},
    "ia3": {
        **{
            f"peft.base_model.model.{site}.{side}.ia3_l.default": [INNER, 1]
            for site in ATTENTIONS
            for side in "kv"
        },
        **{f"peft.base_model.model.{site}.wo.ia3_l.default": [1, F] for site in FFNS},
    },
}
