"""Which examples train, validate and test: the published split rule, few-shot draws, maxima.

Every draw depends on (seed, purpose) alone. Examples of one group stay on one side of a split.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from datasets import Dataset

from pemt.data.errors import DataError
from pemt.data.examples import UNLABELLED
from pemt.tasks import SPLITS, Task, label_with_name

SMALL = 10_000  # training examples (questions, in MultiRC) below which validation is halved
HELD_OUT = 1_000  # training examples that become validation in larger tasks
# What a draw is for: draws with the same seed are independent of each other.
FOR_SPLIT, FOR_FEW_SHOT, FOR_MAXIMUM = 1, 2, 3


def well_formed(
    task: Task, split: str, dataset: Dataset, *, skip_bad_rows: bool
) -> tuple[Dataset, list[str]]:
    """The well-formed, labelled examples of a split, and notes on what was left out.

    Raises DataError for the first malformed row unless they are to be skipped, and where no
    example is left.
    """
    problems = column(dataset, "problem")
    is_bad = problems != ""
    is_unlabelled = np.array([text.endswith(f": {UNLABELLED}") for text in problems], dtype=bool)
    bad = problems[is_bad & ~is_unlabelled]
    if len(bad) and not skip_bad_rows:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise DataError(
            f"{bad[0]}{more}; mend the file, or leave such rows out with --skip_bad_rows"
        )
    notes = []
    if len(bad):
        notes.append(f"{task.name}, {split}: left out {len(bad)} malformed rows, first {bad[0]}")
    if is_unlabelled.any():
        notes.append(
            f"{task.name}, {split}: left out {is_unlabelled.sum()} rows without gold label"
        )
    if by_id := int(np.sum(dataset["is_class_id"][:])):
        notes.append(
            f"{task.name}, {split}: {by_id:,} of {len(dataset):,} labels are numbers, read as places in `labels`: "
            f"{', '.join(f'{i} is {label}' for i, label in enumerate(task.labels))}; label_names changes that"
        )
    if is_bad.all():
        first = f", first {bad[0]}" if len(bad) else ""
        raise DataError(f"task {task.name}: {split} has no usable row of {len(problems)}{first}")
    kept = dataset if not is_bad.any() else dataset.select(np.flatnonzero(~is_bad))
    return kept.remove_columns(["problem", "is_class_id"]), notes


def split(
    task: Task, given: Mapping[str, Dataset], seed: int, validation_split: float | None = None
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """Train, validation and test by the published rule, and in a few words what each was made from.

    With all three given they stay. Without a labelled test set a task with fewer than 10 000
    training examples halves its validation set; a larger one gives 1000 training examples to
    validation and tests on the official validation set. Without a validation set training gives
    its 1000 (never more than a tenth) all the same. A `validation_split` is the share of the training
    examples, of every class alike, that becomes validation; where there is no test set, half of it
    becomes that. The splits are those that `check_splits` lets pass.
    """
    made = dict(given)
    origins = {name: f"the official {name} set" for name in given}
    is_stratified = bool(validation_split)
    number = int(unit_ids(task, given["train"]).max()) + 1
    if "validation" not in given or ("test" not in given and number >= SMALL):
        if "validation" in given:
            made["test"], origins["test"] = given["validation"], origins["validation"]
        share = validation_split or min(HELD_OUT / number, 0.1)
        made["train"], made["validation"] = split_in_two(
            task, given["train"], 1 - share, seed, stratified=is_stratified
        )
        origins["train"] += f" without what validation got, data_seed {seed}"
        origins["validation"] = f"held out of the official train set, data_seed {seed}"
    elif "test" not in given:
        origins["validation"] = f"half of the official validation set, data_seed {seed}"
    if "test" not in made:
        made["validation"], made["test"] = split_in_two(
            task, made["validation"], 0.5, seed, stratified=is_stratified
        )
        origins["test"] = origins["validation"]
    return {name: made[name] for name in SPLITS}, origins


def check_splits(task: Task, found: Collection[str], validation_split: float | None = None) -> None:
    """Raises DataError unless train and one of validation and test are there, or a share to hold out."""
    if validation_split and "validation" in found:
        raise DataError(
            f"validation_split: found {validation_split}, but task {task.name} has a validation set; leave "
            "one of them out"
        )
    if "train" not in found or not (validation_split or {"validation", "test"} & set(found)):
        raise DataError(
            f"task {task.name}: found {', '.join(found) or 'no split'}; train and at least one of "
            "validation (validation, valid, val, dev) and test are needed; `files` of a --task_file may name "
            "them, --validation_split 0.1 takes them from train"
        )


def column(dataset: Dataset, name: str) -> np.ndarray:
    """A column of texts, [N]."""
    return np.asarray(dataset[name][:], dtype=object)


def unit_ids(task: Task, dataset: Dataset) -> np.ndarray:
    """For every example the number of its group, or its own where examples stand alone."""
    if not task.group:
        return np.arange(len(dataset))
    return np.unique(column(dataset, "group"), return_inverse=True)[1]


def split_in_two(
    task: Task, dataset: Dataset, share: float, seed: int, *, stratified: bool = False
) -> tuple[Dataset, Dataset]:
    """Two disjoint parts, the first with `share` of the units, both in the data set's order.

    With `stratified` a class of examples that stand alone has that share in both parts, as nearly as
    whole examples allow.
    """
    units = unit_ids(task, dataset)
    number = int(units.max()) + 1
    size = round(share * number)
    if not 0 < size < number:
        raise DataError(f"task {task.name}: {number} examples cannot be divided in two; give more")
    order = np.random.default_rng([seed, FOR_SPLIT]).permutation(number)
    chosen = order[:size]
    if stratified and task.kind == "classification" and not task.group:
        # In order of class, at random within one; then every n-th. A class of one stays in the first.
        classes = np.unique(column(dataset, "target"), return_inverse=True)[1]
        by_class = order[np.argsort(classes[order], kind="stable")]
        alone = np.bincount(classes)[classes[by_class]] == 1
        others = by_class[~alone]
        if len(others):
            rest = min(max(size - int(alone.sum()), 0), len(others) - 1)
            steps = np.arange(len(others) + 1) * rest // len(others)
            chosen = np.concatenate([by_class[alone], others[np.diff(steps) > 0]])
    is_first = np.isin(units, chosen)
    return dataset.select(np.flatnonzero(is_first)), dataset.select(np.flatnonzero(~is_first))


def few_shot(task: Task, train: Dataset, k: int, seed: int) -> tuple[Dataset, list[str]]:
    """k examples of each class, or k in all for regression and open answers; and notes on what has fewer.

    What has fewer than k gives all it has, as in the published code (CB's smallest class has 16, and the paper
    draws 32). Raises DataError where a class has none.
    """
    rng = np.random.default_rng([seed, FOR_FEW_SHOT])
    targets = column(train, "target")
    classes = task.labels if task.kind == "classification" else (None,)
    chosen, notes = [], []
    for label in classes:
        members = np.arange(len(train)) if label is None else np.flatnonzero(targets == label)
        which = "all of train" if label is None else f"class {label_with_name(task, label)}"
        if not len(members):
            raise DataError(
                f"few_shot: found {k}, but {which} of task {task.name} has no training example; add some, or "
                "train without few_shot"
            )
        if len(members) < k:
            notes.append(
                f"{task.name}: few_shot {k}, but {which} has {len(members)} training examples: all are taken; a "
                f"few_shot of {len(members)} draws as many of each class"
            )
        chosen.append(rng.choice(members, size=min(k, len(members)), replace=False))
    return train.select(np.sort(np.concatenate(chosen))), notes


def limit_examples(task: Task, dataset: Dataset, maximum: int | None, seed: int) -> Dataset:
    """A random part of at most that many examples, whole groups only."""
    if maximum is None or len(dataset) <= maximum:
        return dataset
    units = unit_ids(task, dataset)
    order = np.random.default_rng([seed, FOR_MAXIMUM]).permutation(int(units.max()) + 1)
    sizes = np.cumsum(np.bincount(units)[order])
    chosen = order[: max(1, int(np.searchsorted(sizes, maximum, side="right")))]
    return dataset.select(np.flatnonzero(np.isin(units, chosen)))
