"""`pemt bench step` takes the same step in every variant, and measures it."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pemt.bench import step
from pemt.commands import COMMANDS
from pemt.plan import Zero
from pemt.plan.count import sizes, weights
from pemt.plan.job import CHIPS
from pemt.plan.memory import optimizer_bytes
from pemt.plan.shapes import KNOWN, Shape

SMALL = Shape(
    vocab_size=32_128, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=2,
    gated=False, tied=True,
)  # fmt: skip
BENCH = step.StepBench(batch=2, source=16, target=4, rounds=2)
HALF = replace(BENCH, dtype="bfloat16")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "t5-small", SMALL)


@pytest.fixture
def result(capsys: pytest.CaptureFixture[str]) -> dict:
    arguments = ["--batch", "2", "--source", "16", "--target", "4", "--rounds", "2", "--json"]
    COMMANDS["bench"](["step", *arguments, "--chip", "a10-24"])
    return json.loads(capsys.readouterr().out)


def test_the_variants_take_the_same_step(result: dict) -> None:
    losses = result["first_loss"]
    for variant in ("packed", "fused"):
        assert losses[variant] == pytest.approx(losses["loop"], rel=1e-5)
    assert abs(losses["adapter"] - losses["loop"]) > 1e-3, "without experts it is another model"


def test_time_and_memory_are_told_for_every_variant(result: dict) -> None:
    for figure in ("milliseconds", "tokens_per_second", "over_adapter", "peak_bytes"):
        assert set(result[figure]) == set(step.VARIANTS)
        assert all(value > 0 for value in result[figure].values())
    assert "over adapter" in step.table(result)


def test_rates_are_flops_over_time(result: dict) -> None:
    adapter = step.Step(BENCH, "adapter")
    with FlopCounterMode(display=False) as counter:
        adapter()
    assert result["flops"]["adapter"] == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert result["flops"]["adapter"] < result["flops"]["loop"] == result["flops"]["fused"]
    for name in step.VARIANTS:
        rate = result["flops"][name] / (result["milliseconds"][name] / 1e3)
        assert result["share_of_chip"][name] == pytest.approx(rate / CHIPS["a10-24"].flops)
    assert step.table(result).count(" % of a10-24") == len(step.VARIANTS)
    del result["share_of_chip"]  # as without --chip
    assert "%" not in step.table(result)


def test_half_precision_trains_on_fp32_masters() -> None:
    """A layer norm's 1.0 moves by 1e-4 a step; in bf16 alone it would stay."""
    adapter = step.Step(HALF, "adapter")
    assert {each.dtype for each in adapter.model.parameters()} == {torch.bfloat16}
    name, norm = next(item for item in adapter.model.trainable_parameters() if "norm" in item[0])
    master = adapter.masters[[id(each) for each in adapter.trained].index(id(norm))]
    for _ in range(3):
        adapter()
    assert 0 < (master - 1).abs().max() < 1e-3, name
    for held, used in zip(adapter.masters, adapter.trained, strict=True):
        assert torch.equal(held.bfloat16(), used)


@pytest.mark.parametrize("bench", [BENCH, HALF], ids=["fp32", "bf16"])
def test_what_is_held_is_what_the_planner_counts(bench: step.StepBench) -> None:
    job = bench.job("fused")
    found = weights(job)
    optimizer = optimizer_bytes(found, Zero(name="none", stage=0), job, 1)
    held = job.bytes_per_value * sum(sizes(found).values()) + optimizer
    taken = step.take(bench, ("fused",))["fused"]
    assert taken.held_bytes == held


def test_a_gpu_holds_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def take(bench: step.StepBench, variants: Sequence[str]) -> dict[str, step.Taken]:
        asked.append(tuple(variants))
        told = step.Taken(first_loss=1.0, milliseconds=[1.0], held_bytes=1, peak_bytes=1)
        return dict.fromkeys(variants, told)

    with monkeypatch.context() as patch:
        patch.setattr(step, "take", take)
        step.measure(step.StepBench(device="cuda"))
        assert asked == [(name,) for name in step.VARIANTS]
        step.measure(BENCH)
        assert asked[len(step.VARIANTS) :] == [step.VARIANTS]

    models = []
    build = step.build_model

    def built(*arguments: object) -> object:
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(step, "build_model", built)
    step.take(BENCH, ("adapter",))
    gc.collect()  # as `watch_peak` does before the next
    assert [model() for model in models] == [None]


def test_the_peak_is_that_of_the_call() -> None:
    """64 MB that are taken and given back show; 64 MB that were there before do not."""
    held = torch.ones(16_000_000)
    peak = step.peak_bytes(lambda: torch.ones(16_000_000).sum(), "cpu")
    assert 60e6 < peak < 100e6
    assert held.sum() == 16_000_000


def test_experts_on_other_layers(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "2", "--source", "16", "--target", "4", "--rounds", "2"]
    COMMANDS["bench"](["step", *sizes, "--sites", "q", "v", "--rank", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["milliseconds"]) == {"adapter", "packed", "fused"}
    assert result["first_loss"]["fused"] == pytest.approx(result["first_loss"]["packed"], rel=1e-5)
    assert result["first_loss"]["fused"] != pytest.approx(result["first_loss"]["adapter"], rel=1e-5)
    assert "experts of rank 3 on q, v" in step.table(result)
    assert "6 experts of rank 3" in step.table(result)
    held = step.take(replace(BENCH, sites=("q", "v"), rank=3), ("fused",))["fused"].held_bytes
    assert held < step.take(BENCH, ("fused",))["fused"].held_bytes


def test_a_row_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """LoraHub's adapters: sizes and model of the row, one of them given otherwise."""
    monkeypatch.setitem(KNOWN, "flan-t5-large", replace(SMALL, gated=True, tied=False))
    sizes = ["--batch", "2", "--source", "16", "--target", "4", "--rounds", "1", "--layers", "1"]
    COMMANDS["bench"](["step", "--row", "lorahub", *sizes, "--rank", "5", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["size"], result["sites"], result["experts"]) == ("flan-t5-large", ["q", "v"], 20)
    assert "20 experts of rank 5 on q, v" in step.table(result)
    bench = step.StepBench(size="flan-t5-large", sites=("q", "v"), rank=5, experts=20, layers=1)
    mixed = sizes_of_experts(bench)
    assert mixed == {(64 + 100, 64), (64, 100)}, "the down projections are under q's own weight"
    assert result["flops"]["fused"] > result["flops"]["adapter"]


def sizes_of_experts(bench: step.StepBench) -> set[tuple[int, ...]]:
    named = step.build_model(bench, "fused").named_parameters()
    return {tuple(each.shape) for name, each in named if name.endswith((".q.weight", ".v.up"))}
