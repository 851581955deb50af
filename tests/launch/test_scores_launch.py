"""1, 2 and 3 ranks give the same scores and answers, every example once; a node builds its data once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pemt.config.schema import ExpertConfig
from pemt.run.train import run_adapt, run_source
from tests.conftest import launch_ranks
from tests.launch.launched_scores import BATCH_SIZES, TASK, measure
from tests.support.ranks import deepspeed_json
from tests.support.tiny import (
    adapt_config,
    losses,
    make_base,
    source_config,
    tiny_task,
    write_task_files,
)

RANKS = (1, 2, 3)
SOURCES = ("tiny-scores-a", "tiny-scores-b")
MEASURED_APART = ("test_runtime", "test_samples_per_second")

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.xdist_group("launch")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    base, bank = make_base(folder / "base"), folder / "bank"
    for seed, task in enumerate((*SOURCES, TASK)):
        tiny_task(task)
        write_task_files(folder / task, seed=seed)
    for task in SOURCES:
        paths = (base, folder / task, folder / f"{task}-run", bank)
        run_source(source_config(*paths, task, expert=ExpertConfig(rank=2)))
    learning: dict[str, Any] = {"learning_rate": 0.1, "num_train_epochs": 20}
    seldom: dict[str, Any] = {"eval_strategy": "no", "logging_steps": 100}
    run_adapt(adapt_config(base, folder / TASK, folder / "run", bank, TASK, **learning, **seldom))
    for ranks in RANKS:
        (folder / str(ranks)).mkdir()
    measure(folder, folder / "1")
    # ZeRO-3, in which ranks must call the model equally often; and shards that do not divide the weights.
    for ranks, zero in ((2, deepspeed_json(folder, "zero3")), (3, 2)):
        arguments = ("-m", "tests.launch.launched_scores", str(folder), str(folder / str(ranks)))
        launch_ranks(*arguments, zero=zero, num_processes=ranks)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_scores_are_identical(world: Path, ranks: int, size: int) -> None:
    ours, alone = (
        json.loads((world / str(n) / f"scores-{size}.json").read_text()) for n in (ranks, 1)
    )
    for key in MEASURED_APART:
        del ours[key], alone[key]
    assert alone["examples"] == 11
    assert ours == alone


@pytest.mark.parametrize("size", BATCH_SIZES)
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_answers_are_identical(world: Path, ranks: int, size: int) -> None:
    ours, alone = (lines(world / str(n) / f"answers-{size}.jsonl") for n in (ranks, 1))
    assert ours == alone
    rows = lines(world / TASK / "test.jsonl")
    assert [each["input"] for each in ours] == [f"text : {row['text']}" for row in rows]
    assert len({each["prediction"] for each in ours}) > 1, "one answer to all shows nothing"


@pytest.mark.parametrize("ranks", RANKS)
def test_the_final_test_has_every_example_once(world: Path, ranks: int) -> None:
    rows = lines(world / TASK / "test.jsonl")
    found = lines(world / str(ranks) / "run" / "predictions.jsonl")
    assert [each["input"] for each in found] == [f"text : {row['text']}" for row in rows]
    alone = lines(world / "1" / "run" / "predictions.jsonl")
    assert [each["prediction"] for each in found] == [each["prediction"] for each in alone]


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_stream_trains_alike(world: Path, ranks: int) -> None:
    ours, alone = (losses(world / str(n) / "streamed") for n in (ranks, 1))
    assert len(set(ours.values())) == 8
    assert ours == pytest.approx(alone, rel=2e-6)  # sums are taken in another order


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_node_builds_its_data_once(world: Path, ranks: int) -> None:
    built = [
        json.loads((world / str(ranks) / f"built-{rank}.json").read_text()) for rank in range(ranks)
    ]
    # Of the stream every rank reads two passes of 40 rows, in buffers of 24 and 16.
    streamed = {"examples": 80, "encoded": 4}
    assert built[1:] == [streamed] * (ranks - 1)
    assert built[0] == {"examples": 40 + 11 + 11 + 80, "encoded": 3 + 4}
