"""Streams: every example once an epoch, the same steps for every division of the work, resumed where they stopped."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import PreTrainedTokenizerBase

from pemt.config.schema import AdaptConfig, ConfigError
from pemt.data import DataError, StreamBatches, TrainStream, examples, load_task_data, splits
from pemt.model.tokenizer import load_tokenizer
from pemt.run.train import run_adapt
from pemt.tasks import HubSource, Task
from tests.support.tiny import adapt_config, losses, make_base, tiny_task, write_task_files

TASK = "tiny-stream"
CUTS = ((0, 20), (20, 21), (21, 53))
STREAMED: dict[str, Any] = {
    "streaming": True,
    "eval_strategy": "no",
    "max_steps": 25,
    "method": "adapter",
    "shuffle_buffer_size": 16,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("streaming") / "base")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(base))


def task_rows(count: int) -> list[dict[str, Any]]:
    """Rows that can be told apart by their length and words."""
    words = ["the", "box", "is", "red", "and", "a", "lid", "that", "was", "blue"]
    return [
        {"text": " ".join(words[(i + j) % 10] for j in range(1 + i % 19)), "label": i % 2}
        for i in range(count)
    ]


@dataclass(frozen=True)
class Source:
    """Where a task's rows lie."""

    task: Task
    data_dir: str | None


@pytest.fixture(params=["jsonl", "shards", "hub"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """53 training rows in one file, in three parquet shards, or in a folder laid out as on the hub."""
    rows, task = task_rows(53), tiny_task(TASK)
    if request.param == "jsonl":
        for name, part in (("train", rows), ("dev", rows[:9]), ("test", rows[:9])):
            lines = "\n".join(json.dumps(row) for row in part)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        files = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
        paths = tuple((split, str(tmp_path / name)) for split, name in files.items())
        return Source(replace(task, files=paths), None)
    data = tmp_path / "data"
    data.mkdir()
    shards = {f"train-{i:05d}-of-00003": rows[a:b] for i, (a, b) in enumerate(CUTS)}
    shards |= {f"{split}-00000-of-00001": rows[:9] for split in ("validation", "test")}
    for name, part in shards.items():
        parquet.write_table(pa.Table.from_pylist(part), data / f"{name}.parquet", row_group_size=7)
    if request.param == "shards":
        return Source(task, str(data))
    return Source(replace(task, hub=HubSource(path=str(tmp_path), test="test")), None)


def stream_of(source: Source, base: Path, tokenizer: PreTrainedTokenizerBase) -> TrainStream:
    config = replace(configured(base), data_dir=source.data_dir)
    data = load_task_data(source.task, config, tokenizer)
    assert isinstance(data.train, TrainStream)
    return data.train


def configured(base: Path, **changes: Any) -> AdaptConfig:
    paths = (base, base, base / "out", base / "bank")
    return adapt_config(*paths, TASK, **{**STREAMED, **changes})


def batches(stream: TrainStream, **changes: Any) -> StreamBatches:
    values: dict[str, Any] = {
        "batch_size": 4,
        "accumulation": 1,
        "world_size": 1,
        "rank": 0,
        "seed": 7,
        "buffer_size": 17,
    }
    return StreamBatches(stream, **{**values, **changes})


def sources(steps: Any) -> list[list[str]]:
    return [[row["source"] for micro in step for row in micro] for step in steps]


def test_an_epoch_shows_every_example(source: Source, base: Path, tokenizer: Any) -> None:
    found = batches(stream_of(source, base, tokenizer))
    # 53 examples are buffers of 16, 16, 16 and 5, of 4, 4, 4 and 2 steps.
    steps = sources(found.steps(0, 14))
    counts = Counter(chain.from_iterable(steps))
    expected = Counter(f"text : {row['text']}" for row in task_rows(53))
    assert counts == expected, "an example was not seen, or twice"
    assert found.epochs_at(14) == 0
    lengths = [[len(text.split()) for text in step] for step in steps]
    padded = sum(max(step) * len(step) for step in lengths)
    assert 1 - sum(map(sum, lengths)) / padded < 0.25, "not bucketed"


def test_a_resumed_stream_gives_the_same_batches(
    source: Source, base: Path, tokenizer: Any
) -> None:
    whole = batches(stream_of(source, base, tokenizer))
    steps, positions = [], [json.dumps(whole.position())]
    for step in whole.steps(0, 40):
        steps.append(step)
        positions.append(json.dumps(whole.position()))
    assert json.loads(positions[-1])["epoch"] == 2
    for start in (0, 1, 4, 5, 12, 13, 14, 15, 20, 28, 33):
        again = batches(stream_of(source, base, tokenizer), position=json.loads(positions[start]))
        assert sources(again.steps(start, 40)) == sources(steps[start:]), start


def test_ranks_share_the_steps_of_one(source: Source, base: Path, tokenizer: Any) -> None:
    alone = batches(stream_of(source, base, tokenizer), accumulation=2)
    ranks = [batches(stream_of(source, base, tokenizer), world_size=2, rank=r) for r in (0, 1)]
    shares = [list(rank.steps(0, 20)) for rank in ranks]
    assert len(shares[0]) == len(shares[1]) == 20
    joined = [[*first, *second] for first, second in zip(*shares, strict=True)]
    assert sources(joined) == sources(alone.steps(0, 20))


def test_the_order_depends_on_seed_and_epoch(source: Source, base: Path, tokenizer: Any) -> None:
    first, same, other = (
        sources(batches(stream_of(source, base, tokenizer), seed=seed).steps(0, 28))
        for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other
    assert first[:14] != first[14:], "the second epoch is the first again"


def test_without_both_sets_the_first_examples_are_validation(
    tmp_path: Path, base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = task_rows(53)
    for name, part in (("train", rows), ("validation", rows[:5])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    config = replace(configured(base), data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"found 53 training examples .* first 1000 to validation"):
        load_task_data(tiny_task(TASK), config, tokenizer)
    monkeypatch.setattr(splits, "HELD_OUT", 10)
    data = load_task_data(tiny_task(TASK), config, tokenizer)
    assert [len(data.validation), len(data.test)] == [10, 5]
    assert data.validation["source"][:] == [f"text : {row['text']}" for row in rows[:10]]
    assert isinstance(data.train, TrainStream)
    whole = batches(data.train)
    steps = list(whole.steps(0, 3))
    seen = set(chain.from_iterable(sources([*steps, *whole.steps(3, 30)])))
    assert seen == {f"text : {row['text']}" for row in rows[10:]}
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="found train; train and at least one of"):
        load_task_data(tiny_task(TASK), config, tokenizer)


def test_no_question_is_both_trained_on_and_validated(
    tmp_path: Path, base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Questions of four rows each; the first has one more at the end of the file.
    groups = [*(i // 4 for i in range(52)), 0]
    rows = [{**row, "q": group} for row, group in zip(task_rows(53), groups, strict=True)]
    for name, part in (("train", rows), ("validation", rows[:8])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    monkeypatch.setattr(splits, "HELD_OUT", 10)
    task = replace(tiny_task(TASK), group=("q",))
    data = load_task_data(task, replace(configured(base), data_dir=str(tmp_path)), tokenizer)
    assert data.validation["group"][:] == [str(i // 4) for i in range(12)], "whole questions"
    assert isinstance(data.train, TrainStream)
    steps = batches(data.train).steps(0, 30)
    seen = {row["group"] for step in steps for micro in step for row in micro}
    assert seen == {str(i) for i in range(3, 13)}


def test_bad_rows_stop_the_stream_or_are_counted(
    tmp_path: Path, base: Path, tokenizer: Any
) -> None:
    write_task_files(tmp_path, seed=0)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "the", "label": 7}\n{broken\n')
    config = replace(configured(base), data_dir=str(tmp_path))
    data = load_task_data(tiny_task(TASK), config, tokenizer)
    assert isinstance(data.train, TrainStream)
    with pytest.raises(DataError, match=r"train.jsonl:41: .*unknown label 7.*skip_bad_rows"):
        list(batches(data.train).steps(0, 11))
    data = load_task_data(tiny_task(TASK), replace(config, skip_bad_rows=True), tokenizer)
    assert isinstance(data.train, TrainStream)
    found = batches(data.train)
    assert len(list(found.steps(0, 25))) == 25
    (note,) = found.notes()
    assert "left out 2 malformed rows, first " in note
    assert "train.jsonl:41" in note


def test_no_more_is_read_than_a_buffer(
    tmp_path: Path, base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task_files(tmp_path, seed=0)
    config = replace(configured(base), data_dir=str(tmp_path))
    data = load_task_data(tiny_task(TASK), config, tokenizer)
    assert isinstance(data.train, TrainStream)
    read: list[str] = []
    original = examples.example_row
    monkeypatch.setattr(examples, "example_row", lambda *a: read.append(a[1]) or original(*a))
    steps = batches(data.train).steps(0, 99)
    for expected in (16, 16, 16, 16, 32):
        next(steps)
        # one more may have been looked at, to know whether it is the last
        assert expected <= len(read) <= expected + 1


def test_an_empty_stream_is_told(tmp_path: Path, base: Path, tokenizer: Any) -> None:
    write_task_files(tmp_path, seed=0)
    (tmp_path / "train.jsonl").write_text("")
    config = replace(configured(base), data_dir=str(tmp_path))
    data = load_task_data(tiny_task(TASK), config, tokenizer)
    assert isinstance(data.train, TrainStream)
    with pytest.raises(DataError, match="the stream has nothing to train on"):
        next(batches(data.train).steps(0, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "max_steps: found -1, but a stream's length is not known"),
        ({"eval_strategy": "epoch"}, "eval_strategy: found epoch, but a stream's length"),
        ({"few_shot": 4}, "few_shot: does not go with streaming"),
        ({"max_train_samples": 4}, "max_train_samples: does not go with streaming"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size: found 0"),
    ],
)
def test_what_does_not_go_with_streaming(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(base, **changes)


def test_a_streamed_run_resumes_bit_for_bit(base: Path, tmp_path: Path) -> None:
    tiny_task(TASK)
    data = write_task_files(tmp_path / "data", seed=0)
    fields = {**STREAMED, "save_steps": 7, "save_total_limit": 9}
    whole = adapt_config(base, data, tmp_path / "whole", tmp_path / "bank", TASK, **fields)
    results = run_adapt(whole)
    assert results["epoch"] == 2, "40 examples are 10 steps"
    expected = losses(tmp_path / "whole")
    assert len(set(expected.values())) == 25
    for step in (7, 14):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        again = replace(
            whole, output_dir=str(tmp_path / f"from-{step}"), resume_from_checkpoint=checkpoint
        )
        assert run_adapt(again)["test_loss"] == results["test_loss"]
        assert losses(tmp_path / f"from-{step}") == {
            key: value for key, value in expected.items() if key > step
        }
