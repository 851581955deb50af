"""On two ranks: the same seed twice, a stop in every step, and other numbers of ranks on the way."""

from __future__ import annotations

import json

import pytest

from pemt.run.train import run_adapt
from tests.conftest import Launch
from tests.launch.two_ranks import stopped_after, without_dropout
from tests.support.jobs import World, assert_same_end, final_state, last_step, status
from tests.support.tiny import losses

pytestmark = [pytest.mark.launch, pytest.mark.slow]
# Sums over micro-batches are taken in another order; the losses are about 4.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def runs(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, str]:
    world = World.make(tmp_path_factory.mktemp("two-ranks"))
    stopped_after(without_dropout(world, "from-one", gradient_accumulation_steps="4"), 2)
    launched = launch("-m", "tests.launch.two_ranks", str(world.folder), zero=2)
    return world, launched.output


def test_the_same_seed_twice_gives_the_same_bits(runs: tuple[World, str]) -> None:
    folder = runs[0].folder
    assert_same_end(folder / "again", folder / "whole")
    assert not final_state(folder / "plain")["prompt.prompt"].equal(
        final_state(folder / "whole")["prompt.prompt"]
    ), "dropout makes no difference, so generators are not tested"


def test_a_stop_in_every_step_and_validation_changes_no_bit(runs: tuple[World, str]) -> None:
    """SIGTERM to one rank after the first of two micro-batches; the step is taken to its end by both."""
    folder = runs[0].folder
    assert json.loads((folder / "stops.json").read_text()) == [*["step"] * 3, "validation"]
    assert_same_end(folder / "stopped", folder / "whole")


def test_one_rank_more_and_one_less_keep_global_batch_and_order(
    runs: tuple[World, str], capsys: pytest.CaptureFixture[str]
) -> None:
    world, told = runs
    whole = losses(world.folder / "plain")
    assert "saved on 1 rank(s), now on 2: gradient_accumulation_steps becomes 2" in told
    assert losses(world.folder / "from-one") == pytest.approx(whole, rel=ROUNDING)
    run_adapt(without_dropout(world, "from-two"))
    told = capsys.readouterr().out
    assert "saved on 2 rank(s), now on 1: gradient_accumulation_steps becomes 4" in told
    assert losses(world.folder / "from-two") == pytest.approx(whole, rel=ROUNDING)
    assert len(set(whole.values())) == 3, "losses that do not change show nothing"


def test_rows_in_memory_and_a_callback_that_stops_one_rank(runs: tuple[World, str]) -> None:
    folder = runs[0].folder
    assert last_step(folder / "memory") == 2
    assert status(folder / "memory")["state"] == "finished"
    assert losses(folder / "memory")[1] == losses(folder / "whole")[1], "the same rows and batches"
    told = (folder / "told").read_text()
    assert told.startswith("train: rank 1 was given other data, or another task, than rank 0")
    assert not (folder / "other" / "log.jsonl").exists()
