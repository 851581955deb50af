"""ZeRO 0, 1, 2, 3 on two ranks and one plain process: the same training, by one program (launched.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import launch_ranks
from tests.launch.launched import FEW, RESUMED_STEP, SOME, SOURCES, TARGET
from tests.launch.launched_cuts import UNEVEN, write_uneven_files
from tests.support.ranks import deepspeed_json
from tests.support.tiny import losses, make_base, make_gemma_base, write_task_files

ROOT = Path(__file__).parents[2]
STAGES = ("zero2", "zero0", "zero1", "zero3")  # zero2 makes the checkpoint that all resume from
LAUNCHES = (*STAGES, "plain")
# They resume, and do no more.
OFFLOADS = [
    pytest.param(name, marks=pytest.mark.soak) for name in ("zero2_offload", "zero3_offload")
]


def soaked(name: str, *run: str) -> Any:
    """ZeRO-0 and 1 are ZeRO-2's code with less of it."""
    return pytest.param(name, *run, marks=pytest.mark.soak if name in SOME else ())


EACH = [soaked(name) for name in LAUNCHES]
RUNS = [
    *(soaked(name, run) for name in LAUNCHES for run in (SOURCES[0], "adapt")),
    *((name, SOURCES[1]) for name in LAUNCHES if name not in FEW),
    *((name, run) for name in LAUNCHES if name not in SOME for run in ("gemma-source", "gemma")),
]
# Sums over micro-batches are taken in another order; the losses are about 3.
ROUNDING = 2e-6

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a launch has left; it is started when it is first asked for, behind that of ZeRO-2."""
    world = tmp_path_factory.mktemp("world")
    make_base(world / "base")
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    make_gemma_base(world / "gemma-base", **sizes)  # of its decoder
    for seed, task in enumerate((*SOURCES, TARGET)):
        write_task_files(world / task, seed=seed)
    write_uneven_files(world / UNEVEN)

    @cache
    def launched(name: str) -> Path:
        if name != "zero2":
            launched("zero2")
        (world / name).mkdir()
        program = ("-m", "tests.launch.launched", str(world), str(world / name))
        zero = None if name == "plain" else deepspeed_json(world, name)
        (world / f"{name}.out").write_text(launch_ranks(*program, zero=zero).output)
        return world / name

    return launched


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_losses_agree(folder_of: Callable[[str], Path], name: str, run: str) -> None:
    ours, reference = losses(folder_of(name) / run), losses(folder_of("zero2") / run)
    assert len(ours) == 5
    # Gradients of that random base are large, and Adam's steps carry rounding on.
    assert ours == pytest.approx(reference, rel=1e-4 if run == "gemma-source" else ROUNDING)
    assert len(set(ours.values())) == 5, "a loss that never changes shows nothing"


@pytest.mark.parametrize("name", EACH)
def test_gradient_norms_gates_and_results_agree(
    folder_of: Callable[[str], Path], name: str
) -> None:
    here, there = folder_of(name), folder_of("zero2")
    for tag in (
        *("train/grad_norm", "gate_entropy/decoder", "prompt_similarity/tiny-b"),
        "train/padding_waste",
    ):
        ours = losses(here / "adapt", tag)
        assert len(ours) > 0
        assert ours == pytest.approx(losses(there / "adapt", tag), rel=1e-5), tag
    assert min(losses(here / "adapt", "memory/peak_rss_gb").values()) > 0.05
    ours, reference = report(here)["results"], report(there)["results"]
    for key in ("test_accuracy", "test_loss", "test_moe_weight_0", "test_moe_weight_1"):
        assert ours[key] == pytest.approx(reference[key], rel=1e-5)
    assert ours["sources"] == list(SOURCES)


@pytest.mark.parametrize("name", EACH)
def test_however_the_same_rows_are_cut_it_is_the_same_step(
    folder_of: Callable[[str], Path], name: str
) -> None:
    """Targets of 2 to 16 tokens: a mean over micro-batches of means over tokens would be another loss."""
    whole = report(folder_of("plain"))["cuts"]["1x8x1"]
    ways = report(folder_of(name))["cuts"]
    on_two = {"2x2x2"} if name in FEW else {"2x4x1", "2x2x2", "2x1x4"}
    assert set(ways) == ({"1x8x1", "1x4x2", "1x2x4", "1x1x8"} if name == "plain" else on_two)
    for way, found in ways.items():
        for ours, reference in zip(found["logged"], whole["logged"], strict=True):
            assert ours == pytest.approx(reference, rel=2e-5), way
        for parameter, values in whole["weights"].items():
            assert found["weights"][parameter] == pytest.approx(values, abs=1e-5), (way, parameter)
    assert whole["logged"][0] != pytest.approx(whole["logged"][1], rel=1e-3), "nothing was learned"


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_one_plain_line_of_one_rank(folder_of: Callable[[str], Path], name: str) -> None:
    out = folder_of(name).with_suffix(".out").read_text()
    assert "\r" not in out, "a bar in a file"
    for step in range(1, 6):
        line = rf"^\[.* rank 0\] source tiny-a: step {step}/5, loss \d+\.\d+, [\d.]+ samples/s, \d+:\d+ left$"
        assert len(re.findall(line, out, flags=re.MULTILINE)) == 1, step


@pytest.mark.parametrize("name", [*EACH, *OFFLOADS])
def test_a_checkpoint_of_zero2_resumes_anywhere(
    folder_of: Callable[[str], Path], name: str
) -> None:
    resumed, whole = losses(folder_of(name) / "resumed"), losses(folder_of("zero2") / "adapt")
    assert list(resumed) == [4, 5]
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=ROUNDING)


@pytest.mark.parametrize("name", ["zero2", "zero3", *OFFLOADS])
def test_resume_is_bit_for_bit(folder_of: Callable[[str], Path], name: str) -> None:
    """With dropout, in bf16, where masters hold more than the model's own copies.

    tests/launch/test_faults.py has fp32, and the other stages.
    """
    folder = folder_of(name)
    resumed, whole = losses(folder / "bf16-resumed"), losses(folder / "bf16")
    assert resumed == {step: whole[step] for step in (RESUMED_STEP + 1, RESUMED_STEP + 2)}


@pytest.mark.parametrize("name", EACH)
def test_optimizer_holds_the_trained_alone(folder_of: Callable[[str], Path], name: str) -> None:
    found = report(folder_of(name))
    for stage in ("adapt",) if name in SOME else ("source", "adapt"):
        trained, per_rank = found[stage]["trained"], found[stage]["moment_bytes"]
        assert set(trained) == EXPECTED[stage]
        count = sum(trained.values())
        if name in ("plain", "zero0"):
            assert per_rank == [2 * 4 * count] * len(per_rank)
        else:
            # Shares are of equal size, so each parameter may be filled up by less than one element per rank.
            filling = 2 * 4 * len(trained) * len(per_rank)
            assert 2 * 4 * count <= sum(per_rank) <= 2 * 4 * count + filling
            assert max(per_rank) - min(per_rank) <= filling
        if name != "plain":
            # DeepSpeed alone would broadcast the frozen model too, which every node has read from disk.
            assert found[stage]["broadcast_bytes"] == 4 * count


@pytest.mark.parametrize("name", EACH)
def test_deepspeed_is_asked_whether_it_agrees(folder_of: Callable[[str], Path], name: str) -> None:
    """What it is asked is tested in test_engine_agrees.py."""
    assert report(folder_of(name))["adapt"]["agreements"] == (name != "plain")


@pytest.mark.parametrize("name", EACH)
def test_each_rank_sees_its_own_share(folder_of: Callable[[str], Path], name: str) -> None:
    found = report(folder_of(name))["adapt"]
    seen = [index for shares in found["shares"] for indices in shares for index in indices]
    assert sorted(seen) == list(range(found["examples"])), (
        "an example is missing, or two ranks see it"
    )


def names(*patterns: str) -> set[str]:
    blocks = [("encoder", 0, 1), ("encoder", 1, 1), ("decoder", 0, 2), ("decoder", 1, 2)]
    return {
        f"base.{stack}.block.{block}.layer.{ffn}.{pattern}"
        for stack, block, ffn in blocks
        for pattern in patterns
    }


WO = "DenseReluDense.wo"
EXPECTED = {
    "source": {"prompt.prompt"} | names(f"{WO}.expert.down", f"{WO}.expert.up"),
    "adapt": {
        "prompt.prompt",
        "base.encoder.final_layer_norm.weight",
        "base.decoder.final_layer_norm.weight",
    }
    | names("layer_norm.weight", f"{WO}.gate.weight")
    | {
        f"base.{attention}.{projection}.gate.weight"
        for block in (0, 1)
        for attention in (
            f"encoder.block.{block}.layer.0.SelfAttention",
            f"decoder.block.{block}.layer.0.SelfAttention",
            f"decoder.block.{block}.layer.1.EncDecAttention",
        )
        for projection in "qv"
    }
    | names(
        *(f"{WO}.adapter.{side}.{kind}" for side in ("down", "up") for kind in ("weight", "bias"))
    )
    | {f"base.encoder.block.{block}.layer.0.layer_norm.weight" for block in (0, 1)}
    | {
        f"base.decoder.block.{block}.layer.{layer}.layer_norm.weight"
        for block in (0, 1)
        for layer in (0, 1)
    },
}
