"""The published split rule, few-shot draws and maxima: disjoint, whole, reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from pemt.data import DataError, splits
from pemt.tasks import get_task

RTE = get_task("rte")
MULTIRC = get_task("superglue-multirc")


def examples(size, *, start=0, classes=("0", "1"), group=None):
    numbers = range(start, start + size)
    return Dataset.from_dict(
        {
            "source": [f"s{n}" for n in numbers],
            "target": [classes[n % len(classes)] for n in numbers],
            "references": [[classes[n % len(classes)]] for n in numbers],
            "group": [f"q{n // group}" if group else "" for n in numbers],
        }
    )


def sources(dataset):
    return set(dataset["source"])


def test_small_tasks_halve_their_validation_set():
    train, validation = examples(9_999), examples(277, start=10_000)
    parts, _ = splits.split(RTE, {"train": train, "validation": validation}, seed=1)
    assert sources(parts["train"]) == sources(train)
    assert sources(parts["validation"]) | sources(parts["test"]) == sources(validation)
    assert sorted(map(len, (parts["validation"], parts["test"]))) == [138, 139]


def test_large_tasks_give_a_thousand_training_examples_to_validation():
    train, validation = examples(10_000), examples(277, start=10_000)
    parts, _ = splits.split(RTE, {"train": train, "validation": validation}, seed=1)
    assert sources(parts["test"]) == sources(validation)
    assert len(parts["validation"]) == 1_000
    assert sources(parts["train"]) | sources(parts["validation"]) == sources(train)
    assert len(parts["train"]) == 9_000


def test_a_labelled_test_set_stays_and_validation_comes_from_training_if_it_must():
    train, test = examples(20_000), examples(50, start=20_000)
    parts, _ = splits.split(RTE, {"train": train, "test": test}, seed=1)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [19_000, 1_000, 50]
    three = {"train": train, "validation": test, "test": test}
    assert splits.split(RTE, three, seed=1)[0] == three
    few, _ = splits.split(RTE, {"train": examples(40), "test": test}, seed=1)
    assert [len(few[name]) for name in ("train", "validation", "test")] == [36, 4, 50]


def test_splits_depend_on_the_seed_alone():
    parts = {"train": examples(100), "validation": examples(60, start=100)}
    first, again, other = (splits.split(RTE, parts, seed=seed)[0] for seed in (1, 1, 2))
    assert first["validation"]["source"][:] == again["validation"]["source"][:]
    assert sources(first["validation"]) != sources(other["validation"])


def test_questions_are_not_torn_apart_and_count_once():
    # 3000 questions with 5 answers each are fewer than 10 000.
    train, validation = examples(15_000, group=5), examples(500, start=15_000, group=5)
    parts, _ = splits.split(MULTIRC, {"train": train, "validation": validation}, seed=3)
    groups = [set(parts[name]["group"]) for name in ("validation", "test")]
    assert not groups[0] & groups[1]
    assert [len(group) for group in groups] == [50, 50]


def test_too_little_data_is_told():
    with pytest.raises(DataError, match="found train; train and at least one of validation"):
        splits.check_splits(RTE, {"train"})
    with pytest.raises(DataError, match="1 examples cannot be divided"):
        splits.split(RTE, {"train": examples(5), "validation": examples(1)}, seed=1)


def test_few_shot_draws_k_of_every_class():
    train = examples(300)
    first, again, other = (splits.few_shot(RTE, train, 16, seed=seed)[0] for seed in (1, 1, 2))
    for draw in (first, other):
        assert dict(zip(*np.unique(draw["target"][:], return_counts=True), strict=True)) == {
            "0": 16,
            "1": 16,
        }
    assert first["source"][:] == again["source"][:]
    assert sources(first) != sources(other)


def test_few_shot_for_scores_and_answers_draws_k_in_all():
    for name in ("stsb", "squad"):
        drawn, notes = splits.few_shot(get_task(name), examples(300), 16, seed=1)
        assert (len(drawn), notes) == (16, [])


def test_few_shot_takes_all_of_a_class_that_is_too_small_and_tells_it():
    train = examples(20, classes=("0", "0", "0", "1"))
    drawn, (note,) = splits.few_shot(RTE, train, 6, seed=1)
    assert dict(zip(*np.unique(drawn["target"][:], return_counts=True), strict=True)) == {
        "0": 6,
        "1": 5,
    }
    assert "few_shot 6, but class 1 (not_entailment) has 5 training examples" in note
    assert "a few_shot of 5" in note
    cb = get_task("superglue-cb")
    with pytest.raises(
        DataError, match=r"few_shot: found 1, but class 2 \(neutral\) of task superglue-cb has no"
    ):
        splits.few_shot(cb, train, 1, seed=1)


def test_maxima_keep_a_random_part_and_whole_questions():
    assert len(splits.limit_examples(RTE, examples(100), None, seed=1)) == 100
    part = splits.limit_examples(RTE, examples(100), 30, seed=1)
    assert len(part) == len(sources(part)) == 30
    assert sources(part) != sources(splits.limit_examples(RTE, examples(100), 30, seed=2))
    grouped = splits.limit_examples(MULTIRC, examples(100, group=7), 30, seed=1)
    sizes = np.unique(grouped["group"][:], return_counts=True)[1]
    assert len(grouped) <= 30
    assert set(sizes) <= {7, 2}


def problems(*texts):
    data = examples(len(texts))
    data = data.add_column("is_class_id", [False] * len(texts))
    return data.add_column("problem", list(texts))


def test_malformed_rows_stop_or_are_counted():
    data = problems("", "f.tsv:3: no", "f.tsv:4: no", f"f.tsv:5: {splits.UNLABELLED}", "")
    with pytest.raises(DataError, match=r"f.tsv:3: no \(and 1 more\); mend .*skip_bad_rows"):
        splits.well_formed(RTE, "train", data, skip_bad_rows=False)
    kept, notes = splits.well_formed(RTE, "train", data, skip_bad_rows=True)
    assert sources(kept) == {"s0", "s4"}
    assert notes == [
        "rte, train: left out 2 malformed rows, first f.tsv:3: no",
        "rte, train: left out 1 rows without gold label",
    ]
    with pytest.raises(DataError, match=r"train has no usable row of 1, first f.tsv:3"):
        splits.well_formed(RTE, "train", problems("f.tsv:3: no"), skip_bad_rows=True)
