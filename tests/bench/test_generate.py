"""`pemt bench generate` times the base model and PEMT on the same request."""

from __future__ import annotations

import json

import pytest

from pemt.bench import generate
from pemt.bench.step import StepBench
from pemt.commands import COMMANDS
from pemt.plan.shapes import KNOWN
from tests.bench.test_step import SMALL


def test_all_variants_answer_and_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KNOWN, "t5-small", SMALL)
    bench = generate.GenerateBench(batch=2, source=8, target=3, num_beams=2, rounds=2)
    answers = {name: call() for name, call in generate.variants_of(bench).items()}
    assert {tuple(answer.shape) for answer in answers.values()} == {(2, 4)}
    COMMANDS["bench"](
        ["generate", "--batch", "2", "--source", "8", "--target", "3", "--rounds", "2", "--json"]
    )
    result = json.loads(capsys.readouterr().out)
    assert all(result["milliseconds"][name] > 0 for name in generate.VARIANTS)
    assert result["pemt_over"]["plain"]["computed"] > 0
    assert "pemt / longer" in generate.table(result)


def test_a_few_layers_of_a_large_size() -> None:
    shape = StepBench(size="t5-large", layers=2).shape
    assert (shape.num_layers, shape.num_decoder_layers) == (2, 2)
    assert shape.d_ff == KNOWN["t5-large"].d_ff
