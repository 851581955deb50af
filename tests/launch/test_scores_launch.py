"""1, 2 and 3 ranks give the same scores and answers, every example once; a node builds its data once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pemt.run.train import run_adapt
from tests.conftest import launch_ranks
from tests.launch.launched_scores import TASK, measure
from tests.support.ranks import deepspeed_json
from tests.support.tiny import adapt_config, losses, make_base
from tests.support.trained import train_sources

# By name: ranks, and sizes of batches. Of 11 examples in fours one rank of two has none in its last batch; batches of
# 2, 3 and 4 leave every remainder that 2 and 3 ranks can have.
LAUNCHES = {"1": (1, (4,)), "2": (2, (4,))}
LAUNCHES |= {f"{ranks}-soak": (ranks, (2, 3, 4)) for ranks in (1, 2, 3)}
# ZeRO-3, in which ranks must call the model equally often; and shards that do not divide the weights.
STAGES = {2: "zero3", 3: "zero2"}
NAMES = ["2", *(pytest.param(name, marks=pytest.mark.soak) for name in ("2-soak", "3-soak"))]
SOURCES = ("tiny-scores-a", "tiny-scores-b")
MEASURED_APART = ("test_runtime", "test_samples_per_second")

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What a launch has left, begun when it is first asked for."""
    folder = tmp_path_factory.mktemp("scores")
    make_base(folder / "base", num_layers=1)
    train_sources(folder, SOURCES, TASK)
    learning: dict[str, Any] = {"learning_rate": 0.1, "num_train_epochs": 20}
    seldom: dict[str, Any] = {"eval_strategy": "no", "logging_steps": 100}
    paths = (folder / "base", folder / TASK, folder / "run", folder / "bank")
    run_adapt(adapt_config(*paths, TASK, **learning, **seldom))

    @cache
    def launched(name: str) -> Path:
        ranks, sizes = LAUNCHES[name]
        (folder / name).mkdir()
        if ranks == 1:
            measure(folder, folder / name, sizes)
        else:
            arguments = (str(folder), str(folder / name), *map(str, sizes))
            zero = deepspeed_json(folder, STAGES[ranks])
            program = ("-m", "tests.launch.launched_scores", *arguments)
            launch_ranks(*program, zero=zero, num_processes=ranks)
        return folder / name

    return launched


def both(folder_of: Callable[[str], Path], name: str) -> tuple[Path, Path]:
    """What ranks have left, and what one process."""
    return folder_of(name), folder_of("1" + name[1:])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_answers_are_identical(folder_of: Callable[[str], Path], name: str) -> None:
    here, there = both(folder_of, name)
    for size in LAUNCHES[name][1]:
        scores = [json.loads((each / f"scores-{size}.json").read_text()) for each in (here, there)]
        for each in scores:
            for key in MEASURED_APART:
                del each[key]
        assert scores[1]["examples"] == 11
        assert scores[0] == scores[1]
        ours, alone = (lines(each / f"answers-{size}.jsonl") for each in (here, there))
        assert ours == alone
        rows = lines(here.parent / TASK / "test.jsonl")
        assert [each["input"] for each in ours] == [f"text : {row['text']}" for row in rows]
        assert len({each["prediction"] for each in ours}) > 1, "one answer to all shows nothing"


@pytest.mark.parametrize("name", NAMES)
def test_the_final_test_has_every_example_once(folder_of: Callable[[str], Path], name: str) -> None:
    here, there = both(folder_of, name)
    rows = lines(here.parent / TASK / "test.jsonl")
    found, alone = (lines(each / "run" / "predictions.jsonl") for each in (here, there))
    for each in (found, alone):
        assert [line["input"] for line in each] == [f"text : {row['text']}" for row in rows]
    assert [each["prediction"] for each in found] == [each["prediction"] for each in alone]


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_trains_alike(folder_of: Callable[[str], Path], name: str) -> None:
    ours, alone = (losses(each / "streamed") for each in both(folder_of, name))
    assert len(set(ours.values())) == 5
    assert ours == pytest.approx(alone, rel=2e-6)  # sums are taken in another order


@pytest.mark.parametrize("name", NAMES)
def test_a_node_builds_its_data_once(folder_of: Callable[[str], Path], name: str) -> None:
    folder, ranks = folder_of(name), LAUNCHES[name][0]
    built = [json.loads((folder / f"built-{rank}.json").read_text()) for rank in range(ranks)]
    # Of the stream every rank reads a pass of 40 rows, in buffers of 24 and 16, and begins another.
    streamed = {"examples": 64, "encoded": 3}
    assert built[1:] == [streamed] * (ranks - 1)
    assert built[0] == {"examples": 40 + 11 + 11 + 64, "encoded": 3 + 3}
