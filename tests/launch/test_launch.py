"""ZeRO 0, 1, 2, 3 on two ranks and one plain process: the same training, by one program (launched.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import launch_ranks
from tests.launch.launched import RESUMED_STEP, SOURCES, TARGET
from tests.launch.launched_cuts import UNEVEN, write_uneven_files
from tests.support.ranks import deepspeed_json
from tests.support.tiny import losses, make_base, make_gemma_base, write_task_files

ROOT = Path(__file__).parents[2]
STAGES = ("zero2", "zero0", "zero1", "zero3")  # zero2 makes the checkpoint that all resume from
LAUNCHES = (*STAGES, "plain")
OFFLOADS = ("zero2_offload", "zero3_offload")  # they resume, and do no more
# Sums over micro-batches are taken in another order; the losses are about 3.
ROUNDING = 2e-6

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.xdist_group("launch")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_base(folder / "base")
    make_gemma_base(folder / "gemma-base", hidden_size=12, intermediate_size=20)
    for seed, task in enumerate((*SOURCES, TARGET)):
        write_task_files(folder / task, seed=seed)
    write_uneven_files(folder / UNEVEN)
    for name in (*LAUNCHES, *OFFLOADS):
        (folder / name).mkdir()
        launch(folder, name)
    return folder


def launch(world: Path, name: str) -> None:
    program = ("-m", "tests.launch.launched", str(world), str(world / name))
    launched = launch_ranks(*program, zero=None if name == "plain" else deepspeed_json(world, name))
    (world / f"{name}.out").write_text(launched.output)


def report(world: Path, name: str) -> dict[str, Any]:
    return json.loads((world / name / "report.json").read_text())


@pytest.mark.parametrize("run", [*SOURCES, "adapt", "gemma-source", "gemma"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_losses_agree(world: Path, name: str, run: str) -> None:
    ours, reference = losses(world / name / run), losses(world / "zero2" / run)
    assert len(ours) == 5
    # Gradients of that random base are large, and Adam's steps carry rounding on.
    assert ours == pytest.approx(reference, rel=1e-4 if run == "gemma-source" else ROUNDING)
    assert len(set(ours.values())) == 5, "a loss that never changes shows nothing"


@pytest.mark.parametrize("name", LAUNCHES)
def test_gradient_norms_and_results_agree(world: Path, name: str) -> None:
    tag = "train/grad_norm"
    assert losses(world / name / "adapt", tag) == pytest.approx(
        losses(world / "zero2" / "adapt", tag), rel=1e-5
    )
    ours, reference = report(world, name)["results"], report(world, "zero2")["results"]
    for key in ("test_accuracy", "test_loss", "test_moe_weight_0", "test_moe_weight_1"):
        assert ours[key] == pytest.approx(reference[key], rel=1e-5)
    assert ours["sources"] == list(SOURCES)


@pytest.mark.parametrize("name", LAUNCHES)
def test_however_the_same_rows_are_cut_it_is_the_same_step(world: Path, name: str) -> None:
    """Targets of 2 to 16 tokens: a mean over micro-batches of means over tokens would be another loss."""
    whole = report(world, "plain")["cuts"]["1x8x1"]
    ways = report(world, name)["cuts"]
    assert set(ways) == (
        {"1x8x1", "1x4x2", "1x2x4", "1x1x8"} if name == "plain" else {"2x4x1", "2x2x2", "2x1x4"}
    )
    for way, found in ways.items():
        for ours, reference in zip(found["logged"], whole["logged"], strict=True):
            assert ours == pytest.approx(reference, rel=2e-5), way
        for parameter, values in whole["weights"].items():
            assert found["weights"][parameter] == pytest.approx(values, abs=1e-5), (way, parameter)
    assert whole["logged"][0] != pytest.approx(whole["logged"][1], rel=1e-3), "nothing was learned"


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_is_one_plain_line_of_one_rank(world: Path, name: str) -> None:
    out = (world / f"{name}.out").read_text()
    assert "\r" not in out, "a bar in a file"
    for step in range(1, 6):
        line = rf"^\[.* rank 0\] source tiny-a: step {step}/5, loss \d+\.\d+, [\d.]+ samples/s, \d+:\d+ left$"
        assert len(re.findall(line, out, flags=re.MULTILINE)) == 1, step


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_is_seen_of_gates_and_prompts_agrees(world: Path, name: str) -> None:
    for tag in ("gate_entropy/decoder", "prompt_similarity/tiny-b", "train/padding_waste"):
        ours, reference = (
            losses(world / name / "adapt", tag),
            losses(world / "zero2" / "adapt", tag),
        )
        assert len(ours) > 0
        assert ours == pytest.approx(reference, rel=1e-5), tag
    assert min(losses(world / name / "adapt", "memory/peak_rss_gb").values()) > 0.05


@pytest.mark.parametrize("name", [*LAUNCHES, *OFFLOADS])
def test_a_checkpoint_of_zero2_resumes_anywhere(world: Path, name: str) -> None:
    resumed, whole = losses(world / name / "resumed"), losses(world / "zero2" / "adapt")
    assert list(resumed) == [4, 5]
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=ROUNDING)


@pytest.mark.parametrize("name", [*LAUNCHES, *OFFLOADS])
def test_resume_is_bit_for_bit(world: Path, name: str) -> None:
    """With dropout, in bf16, where masters hold more than the model's own copies; test_faults.py does it in fp32."""
    resumed, whole = losses(world / name / "bf16-resumed"), losses(world / name / "bf16")
    assert resumed == {step: whole[step] for step in (RESUMED_STEP + 1, RESUMED_STEP + 2)}


@pytest.mark.parametrize("stage", ["source", "adapt"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_optimizer_holds_the_trained_alone(world: Path, name: str, stage: str) -> None:
    found = report(world, name)[stage]
    assert set(found["trained"]) == EXPECTED[stage]
    count = sum(found["trained"].values())
    per_rank = found["moment_bytes"]
    if name in ("plain", "zero0"):
        assert per_rank == [2 * 4 * count] * len(per_rank)
    else:
        # Shares are of equal size, so each parameter may be filled up by less than one element per rank.
        filling = 2 * 4 * len(found["trained"]) * len(per_rank)
        assert 2 * 4 * count <= sum(per_rank) <= 2 * 4 * count + filling
        assert max(per_rank) - min(per_rank) <= filling


@pytest.mark.parametrize("stage", ["source", "adapt"])
@pytest.mark.parametrize("name", STAGES)
def test_the_start_sends_what_is_trained_and_no_more(world: Path, name: str, stage: str) -> None:
    """DeepSpeed alone would broadcast the frozen model too, which every node has read from disk."""
    found = report(world, name)[stage]
    assert found["broadcast_bytes"] == 4 * sum(found["trained"].values())


@pytest.mark.parametrize("name", LAUNCHES)
def test_deepspeed_is_asked_whether_it_agrees(world: Path, name: str) -> None:
    """What it is asked is tested in test_engine_agrees.py."""
    assert report(world, name)["adapt"]["agreements"] == (name != "plain")


@pytest.mark.parametrize("name", LAUNCHES)
def test_each_rank_sees_its_own_share(world: Path, name: str) -> None:
    found = report(world, name)["adapt"]
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
