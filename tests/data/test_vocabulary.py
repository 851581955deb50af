"""What the vocabulary cannot write, and targets longer than the limit: refused, or counted and told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from pemt.config.schema import AdaptConfig
from pemt.data import DataError, StreamBatches, TrainStream, load_split, load_task_data, unknown
from pemt.data.vocabulary import comparable, round_trip
from pemt.model.tokenizer import load_tokenizer
from pemt.tasks import HubSource, Task, get_task, longest_target, score

OPEN = Task(name="open", description="D.", template="text: {text}", metrics=("squad", "accuracy"))
LONG = "the box number 0 is in the big hall and the lid of the box is red"  # 19 tokens
CUT, RAISE = "are longer than", "raise max_target_length"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    return load_tokenizer(str(shared / "data/t5_tokenizer"))


def loaded(tmp_path: Path, tokenizer: Any, task: Task, **parts: Any) -> Any:
    """A task's data from rows (text, label) of each split; fields of the configuration besides."""
    fields = {k: v for k, v in parts.items() if k not in ("train", "validation", "test")}
    for split in ("train", "validation", "test"):
        rows = [{"text": text, "label": label} for text, label in parts[split]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return load_task_data(task, config(tmp_path, **fields), tokenizer)


def config(data_dir: Path, **fields: Any) -> AdaptConfig:
    values = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "task_name": "open",
        "method": "adapter",
    }
    return AdaptConfig(**{**values, "data_dir": str(data_dir), **fields})


@pytest.mark.parametrize(
    ("labels", "found", "becomes", "alike"),
    [
        (("não", "sim"), "'não'", "'no'", ""),
        (("sim", "nõo", "não"), "'nõo'", "'no'", "label 'não' does"),
        (("no", "no {"), "'no {'", "'no '", "label 'no' does"),
        (("nope", "não"), "'não'", "'no'", "label 'nope' begins so"),
        (("😀", "sad"), "'😀'", "''", ""),
        (("<", "big"), "'<'", "''", ""),
        (("a\nb", "c"), r"'a\\nb'", "'a b'", ""),
        (("a  b", "c"), "'a  b'", "'a b'", ""),
        ((" a", "c"), "' a'", "'a'", "label"),
        (("ﬁ", "c"), "'ﬁ'", "'fi'", ""),
        (("</s>", "c"), "'</s>'", "''", ""),
    ],
)
def test_a_label_that_the_vocabulary_cannot_write_is_refused_with_what_it_becomes(
    tmp_path, tokenizer, labels, found, becomes, alike
):
    task = dataclasses.replace(OPEN, labels=labels, metrics=("accuracy",), max_target_length=16)
    rows = [("t", label) for label in labels if label.strip()] * 2
    if alike == "label":
        alike = ""
    with pytest.raises(
        DataError, match=f"labels: found {found} .* writes as {becomes}.*{alike}"
    ) as told:
        loaded(tmp_path, tokenizer, task, train=rows, validation=rows, test=rows)
    assert "\n" not in str(told.value)


def test_labels_that_begin_alike_are_fine(tmp_path, tokenizer):
    labels = ("1", "10", "yes", "yes, please", "café", "über")
    task = dataclasses.replace(OPEN, labels=labels, metrics=("accuracy",), max_target_length=16)
    rows = [("t", label) for label in labels]
    data = loaded(tmp_path, tokenizer, task, train=rows, validation=rows, test=rows)
    answers = tokenizer.batch_decode(data.test["labels"][:], skip_special_tokens=True)
    assert score(task, answers, data.test)["accuracy"] == 100
    assert data.notes == ()


def test_answers_that_cannot_be_written_are_told_and_scored_by_what_can(tmp_path, tokenizer):
    rows = [("a", "naïve {x}"), ("b", "two  blanks\nhere"), ("c", ["plain", "🙂 ok"]), ("d", "😀")]
    data = loaded(tmp_path, tokenizer, OPEN, train=rows, validation=rows[2:3], test=rows)
    assert [line for line in data.notes if "written" in line] == [
        f"open, {split}: 3 of 4 targets cannot be written by this vocabulary; the first: "
        "'naïve {x}' becomes 'nave x'"
        for split in ("train", "test")
    ]
    assert data.test["target"][:] == [
        row[1] if isinstance(row[1], str) else row[1][0] for row in rows
    ]
    answers = tokenizer.batch_decode(data.test["labels"][:], skip_special_tokens=True)
    assert answers[:3] == ["nave x", "two blanks here", "plain"]
    # All that can be written is right; an answer of nothing is not.
    assert score(OPEN, answers, data.test) == pytest.approx(
        {"exact_match": 75, "f1": 75, "accuracy": 75, "average_metrics": 75}
    )
    assert comparable([["🙂 ok", "ok", "é"]], tokenizer) == [
        [*round_trip(["🙂 ok"], tokenizer), "ok", "é"]
    ]


def test_sources_with_unknown_pieces_are_counted(tmp_path, tokenizer):
    plain, odd = [("a", "b")] * 3, [("a " * 80 + "x < {y}", "b"), ("a </s> b", "b")]
    data = loaded(tmp_path, tokenizer, OPEN, train=plain + odd, validation=plain, test=plain)
    (line,) = [line for line in data.notes if "unknown" in line]
    assert line.startswith(
        "open, train: 2 of 5 sources contain pieces unknown to this vocabulary; the first: …'"
    )
    assert "x < {y}' becomes …'" in line, "shown is where it is unknown"
    ids = [tokenizer(text).input_ids for text in ("a", "naïve", "", "<extra_id_0>", "a<pad>")]
    assert unknown(ids, tokenizer) == [False, True, False, False, True]


def test_cut_targets_are_told_with_the_field_to_raise(tmp_path, tokenizer):
    rows = [("a", LONG), ("b", "short")]
    data = loaded(
        tmp_path, tokenizer, OPEN, train=rows, validation=rows[1:], test=rows, max_target_length=9
    )
    assert data.notes == tuple(
        f"open, {split}: 1 of 2 targets {CUT} 9 tokens and were cut; the longest has 19: {RAISE}"
        for split in ("train", "test")
    )
    assert [len(ids) for ids in data.train["labels"]] == [9, 2]
    assert data.train["labels"][0][-1] == tokenizer.eos_token_id
    assert not data.is_measured


def test_the_longest_answer_is_measured_from_train_and_validation(tmp_path, tokenizer):
    train, validation = [("a", LONG), ("b", "short")], [("c", f"{LONG} {LONG}")]
    test = [("d", f"{LONG} {LONG} {LONG}")]
    data = loaded(tmp_path, tokenizer, OPEN, train=train, validation=validation, test=test)
    assert (data.max_target_length, data.is_measured) == (37, True)
    assert data.notes == (
        "open: max_target_length is 37; the longest target of train and validation has 37 tokens",
        f"open, test: 1 of 1 targets {CUT} 37 tokens and were cut; the longest has 55: {RAISE}",
    )
    short = loaded(tmp_path, tokenizer, OPEN, train=train[1:], validation=train[1:], test=train[1:])
    assert short.max_target_length == 16
    one = [("a", "box " * 400)]
    assert (
        loaded(tmp_path, tokenizer, OPEN, train=one, validation=one, test=one).max_target_length
        == 256
    )
    own = dataclasses.replace(OPEN, max_target_length=20)
    data = loaded(tmp_path, tokenizer, own, train=train, validation=validation, test=test)
    assert (data.max_target_length, data.is_measured) == (20, False)
    assert [longest_target(get_task(name), None) for name in ("squad", "rte", "stsb")] == [
        32,
        16,
        16,
    ]
    assert [longest_target(OPEN, given) for given in (None, 7)] == [16, 7]
    # A split alone, as `pemt evaluate` scores it, has what the run has measured.
    finished = dataclasses.replace(OPEN, max_target_length=37)
    _, notes, _ = load_split(finished, config(tmp_path), tokenizer, "test")
    assert notes == (
        f"open, test: 1 of 1 targets {CUT} 37 tokens and were cut; the longest has 55: {RAISE}",
    )


def test_a_stream_tells_once_while_it_runs_and_all_at_the_end(tmp_path, tokenizer):
    train, rest = [("a", LONG)] * 3 + [("😀", "ñandú")] * 5, [("c", f"the {LONG}"), ("d", "x")]
    fields = {"streaming": True, "max_steps": 1, "eval_strategy": "no"}
    data = loaded(tmp_path, tokenizer, OPEN, train=train, validation=rest, test=rest, **fields)
    assert data.notes == (
        "open: max_target_length is 20; the longest target of validation has 20 tokens",
    )
    data = loaded(
        tmp_path,
        tokenizer,
        OPEN,
        train=train,
        validation=rest,
        test=rest,
        max_target_length=9,
        **fields,
    )
    assert isinstance(data.train, TrainStream)
    batches = StreamBatches(
        data.train, batch_size=2, accumulation=1, world_size=1, rank=0, seed=1, buffer_size=4
    )
    steps = batches.steps(0, 4)
    assert batches.notes(at_end=False) == []
    rows = [row for micro in next(steps) for row in micro]
    assert not {"target_cut", "target_length"} & set(rows[0])
    (cut, *_), again = batches.notes(at_end=False), batches.notes(at_end=False)
    assert "3 of 4 targets are longer than 9 tokens" in cut or "1 of 4 sources" in cut
    assert again == []
    list(steps)
    assert [line.partition(";")[0] for line in batches.notes()] == [
        "open, train: 5 of 8 sources contain pieces unknown to this vocabulary",
        "open, train: 3 of 8 targets are longer than 9 tokens and were cut",
        "open, train: 5 of 8 targets cannot be written by this vocabulary",
    ]


def test_numbers_that_only_their_place_explains_are_told(tmp_path, tokenizer):
    def notes(*labels: str, values: tuple[Any, ...]) -> list[str]:
        task = dataclasses.replace(OPEN, labels=labels, metrics=("accuracy",), max_target_length=16)
        rows = [("t", value) for value in values]
        return list(loaded(tmp_path, tokenizer, task, train=rows, validation=rows, test=rows).notes)

    told = "2 of 2 labels are numbers, read as places in `labels`: 0 is positive, 1 is negative; "
    told += "label_names changes that"
    assert notes("positive", "negative", values=(0, 1)) == [
        f"open, {split}: {told}" for split in ("train", "validation", "test")
    ]
    assert notes("positive", "negative", values=("negative", "positive")) == []
    assert notes("no", "yes", values=(0, True)) == []
    assert notes("0", "1", values=(0, True)) == []
    (order,) = notes("1", "0", values=(0, 1))
    assert (
        order
        == "open: labels are 1, 0 in this order; a number in a row is the label of that name, not the class id"
    )


def test_a_hub_data_set_numbers_its_classes_itself(tmp_path, tokenizer, monkeypatch):
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    monkeypatch.setattr("pemt.data.examples.load_hub", lambda *_, **__: rows)
    task = dataclasses.replace(
        OPEN, labels=("positive", "negative"), metrics=("accuracy",), hub=HubSource(path="a/b")
    )
    data = load_task_data(task, dataclasses.replace(config(tmp_path), data_dir=None), tokenizer)
    assert data.train["target"][:] == ["negative", "positive"]
    assert data.notes == ()
    # Under names of its own they are class ids, and no truth values.
    task = dataclasses.replace(task, labels=("yes", "no"))
    data = load_task_data(task, dataclasses.replace(config(tmp_path), data_dir=None), tokenizer)
    assert data.train["target"][:] == ["yes", "no"]
    assert len([line for line in data.notes if "read as places in `labels`: 0 is yes" in line]) == 2
