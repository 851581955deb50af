"""`pemt bench step` takes the same step in every variant, and measures it."""

from __future__ import annotations

import json

import pytest
import torch

from pemt.bench import step
from pemt.commands import COMMANDS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.SIZES, "t5-small", (2, 64, 128, 2, 32, "relu"))


@pytest.fixture
def result(capsys: pytest.CaptureFixture[str]) -> dict:
    arguments = ["--batch", "2", "--source", "16", "--target", "4", "--rounds", "2", "--json"]
    COMMANDS["bench"](["step", *arguments])
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


def test_the_peak_is_that_of_the_call() -> None:
    """64 MB that are taken and given back show; 64 MB that were there before do not."""
    held = torch.ones(16_000_000)
    peak = step.peak_bytes(lambda: torch.ones(16_000_000).sum(), "cpu")
    assert 60e6 < peak < 100e6
    assert held.sum() == 16_000_000
