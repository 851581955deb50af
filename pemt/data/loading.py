"""From a task's name to tokenised, memory-mapped train, validation and test sets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from pemt.config import RunConfig
from pemt.data import splits
from pemt.data.errors import DataError
from pemt.data.examples import Origin, origin_of
from pemt.data.streaming import TrainStream
from pemt.tasks import Task

# Below this many examples one process (whose tokenizer has its own threads) is faster than several.
PARALLEL_FROM = 50_000
MAX_PROCESSES = 8


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's three sets, tokenised.

    Columns: `input_ids` and `labels` (ids with the end of sequence, unpadded), `length` (of
    input_ids), and what scoring needs: `source`, `target`, `references`, `group`.
    `max_target_length` bounds the labels and what is to be generated, in tokens; `pad_to_multiple_of`
    is the configuration's; `notes` says in one line each what was left out or cut.
    """

    train: Dataset | TrainStream
    validation: Dataset
    test: Dataset
    max_target_length: int
    pad_to_multiple_of: int | None
    notes: tuple[str, ...]


def load_task_data(
    task: Task,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    local_main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TaskData:
    """Loads, splits, draws and tokenises a task's data.

    `local_main_first` is entered once around everything: a context in which one process of a node runs
    before the others, which then find all files in the cache of `datasets`.

    Raises DataError for a missing or malformed file or row, a class with too few examples, or
    labels longer than `max_target_length`.
    """
    with local_main_first():
        return build(task, config, tokenizer)


def load_split(
    task: Task,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    *,
    local_main_first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Dataset, tuple[str, ...]]:
    """One of the sets that `load_task_data` gives, and its notes; no other split has to be there,
    unless `few_shot` draws the training set.

    Where there is nothing to train on, a split is what its files or the hub give: the split rule
    needs the training set. Raises DataError as `load_task_data`, and where the split is missing.
    """
    with local_main_first():
        origin = origin_of(task, config.data_dir)
        is_drawn = split == "train" and config.few_shot is not None
        if is_drawn or not stands_alone(split, origin.splits):
            data = build(task, config, tokenizer)
            return getattr(data, split), data.notes
        examples, left_out = usable(origin, split, config)
        encoded, cut = encode(examples, split, Encoder(task, config, tokenizer), config)
        return encoded, (*origin.notes, *left_out, *cut)


def stands_alone(split: str, there: Collection[str]) -> bool:
    """Whether a split is one that is there, unchanged by the split rule."""
    has_rule = "train" in there and not {"validation", "test"} <= set(there) and len(there) > 1
    return split in there and (split == "test" or not has_rule)


def build(task: Task, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """What load_task_data does, in this process."""
    seed = config.effective_data_seed
    origin = origin_of(task, config.data_dir)
    splits.check_splits(task, origin.splits)
    notes = list(origin.notes)
    parts = {}
    for name in origin.splits:
        if name != "train" or not config.streaming:
            parts[name], left_out = usable(origin, name, config)
            notes += left_out
    encoder = Encoder(task, config, tokenizer)
    sets: dict[str, Any] = {}
    if config.streaming:
        sets["train"], parts = streamed(origin, config, encoder, parts)
    else:
        parts = splits.split(task, parts, seed)
        if config.few_shot is not None:
            parts["train"] = splits.few_shot(task, parts["train"], config.few_shot, seed)
    for name, examples in parts.items():
        sets[name], cut = encode(examples, name, encoder, config)
        notes += cut
    return TaskData(
        **sets,
        max_target_length=encoder.max_target_length,
        pad_to_multiple_of=config.pad_to_multiple_of,
        notes=tuple(notes),
    )


def usable(origin: Origin, split: str, config: RunConfig) -> tuple[Dataset, list[str]]:
    """A split's well-formed examples, and notes on what was left out."""
    examples = origin.examples(split)
    return splits.usable(origin.task, split, examples, skip_bad_rows=config.skip_bad_rows)


def encode(
    examples: Dataset, split: str, encoder: Encoder, config: RunConfig
) -> tuple[Dataset, list[str]]:
    """A split with token ids, no larger than the configuration wants it, and a note on what was cut."""
    task, is_train = encoder.task, split == "train"
    maximum = config.max_train_samples if is_train else config.max_eval_samples
    chosen = splits.at_most(task, examples, maximum, config.effective_data_seed)
    encoded = encoder.encode(chosen, every_answer=is_train and task.train_on_every_answer)
    cut = sum(encoded["is_cut"][:])
    note = (
        f"{task.name}, {split}: {cut} of {len(encoded)} sources are longer than "
        f"{config.max_source_length} tokens and were cut"
    )
    return encoded.remove_columns("is_cut"), [note] if cut else []


def streamed(
    origin: Origin, config: RunConfig, encoder: Encoder, parts: Mapping[str, Dataset]
) -> tuple[TrainStream, dict[str, Dataset]]:
    """A training stream, and validation and test by the rule for large tasks.

    With both given they stay; otherwise the one that is there is the test set, and the stream's first
    examples are validation, to the end of the last one's group.
    """
    task = origin.task
    stream = TrainStream(
        origin,
        encode=partial(encode_batch, **encoder.settings(every_answer=task.train_on_every_answer)),
        skip_bad_rows=config.skip_bad_rows,
    )
    if len(parts) == 2:
        return stream, dict(parts)
    first: list[dict[str, Any]] = []
    for row in stream.usable():
        if len(first) >= splits.HELD_OUT and not (
            task.group and row["group"] == first[-1]["group"]
        ):
            break
        first.append(row)
    else:
        raise DataError(
            f"task {task.name}: found {len(first)} training examples and one set to score on; a stream gives its "
            f"first {splits.HELD_OUT} to validation: give both sets, or train without --streaming"
        )
    stream.hold_out(first)
    (test,) = parts.values()
    return stream, {
        "validation": Dataset.from_list(first, features=test.features),
        "test": test,
    }


class Encoder:
    """Tokenises examples; the same task, tokenizer and lengths find the cached result."""

    def __init__(self, task: Task, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.workers = config.preprocessing_num_workers
        self.max_source_length = config.max_source_length
        self.max_target_length = config.max_target_length or task.max_target_length
        self.lengths = (self.max_source_length, self.max_target_length)
        for label in task.labels:
            length = len(tokenizer(label).input_ids)
            if length > self.max_target_length:
                raise DataError(
                    f"max_target_length: found {self.max_target_length}, but label {label!r} of "
                    f"task {task.name} has {length} tokens; give {length} or more"
                )

    def encode(self, examples: Dataset, *, every_answer: bool) -> Dataset:
        """Adds input_ids, labels, length and is_cut; with `every_answer` a row per reference."""
        processes = self.workers or 1
        if self.workers is None and len(examples) >= PARALLEL_FROM:
            processes = min(MAX_PROCESSES, os.cpu_count() or 1)
        return examples.map(
            encode_batch,
            batched=True,
            remove_columns=examples.column_names,
            num_proc=min(processes, len(examples)) if processes > 1 else None,
            fn_kwargs=self.settings(every_answer=every_answer),
            new_fingerprint=Hasher.hash(
                [examples._fingerprint, self.identity, self.lengths, every_answer]
            ),
            desc="tokenising",
        )

    def settings(self, *, every_answer: bool) -> dict[str, Any]:
        """What `encode_batch` is given besides a batch."""
        return {"tokenizer": self.tokenizer, "lengths": self.lengths, "every_answer": every_answer}

    @cached_property
    def identity(self) -> str:
        """A hash of the tokenizer's tables, without the truncation its last call left there."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return Hasher.hash(self.tokenizer)
        tables = json.loads(backend.to_str())
        text = json.dumps({**tables, "truncation": None, "padding": None}, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


def encode_batch(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    lengths: tuple[int, int],
    every_answer: bool,
) -> dict[str, list[Any]]:
    """A batch of examples with their token ids."""
    columns = {name: list(values) for name, values in batch.items()}
    if every_answer:
        pairs = [(i, text) for i, texts in enumerate(columns["references"]) for text in texts]
        columns = {name: [values[i] for i, _ in pairs] for name, values in columns.items()}
        columns["target"] = [text for _, text in pairs]
    sources, cut = encode_sources(columns["source"], tokenizer, max_length=lengths[0])
    targets = tokenizer(
        text_target=columns["target"], max_length=lengths[1], truncation=True
    ).input_ids
    return {
        **columns,
        "input_ids": sources,
        "labels": targets,
        "length": [len(ids) for ids in sources],
        "is_cut": cut,
    }


def encode_sources(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of source texts, of at most `max_length` tokens, and which of them had to be cut."""
    every = tokenizer(texts, add_special_tokens=True).input_ids
    cut = [len(ids) > max_length for ids in every]
    # The end of sequence stays when the text is cut.
    kept = [
        [*ids[: max_length - 1], ids[-1]] if is_cut else ids
        for ids, is_cut in zip(every, cut, strict=True)
    ]
    return kept, cut


def lengths_of(dataset: Dataset) -> np.ndarray:
    """The number of source tokens of every example, [N]."""
    return np.asarray(dataset["length"][:], dtype=np.int64)
