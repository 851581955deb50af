"""From a task's name to tokenised, memory-mapped train, validation and test sets."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pemt.config import RunConfig
from pemt.data import splits
from pemt.data.encoding import Encoder
from pemt.data.errors import DataError
from pemt.data.examples import DataLocation, locate_data
from pemt.data.in_memory import MemoryData
from pemt.data.streaming import TrainStream
from pemt.data.vocabulary import FLAGS, MOST_MEASURED, encode_targets
from pemt.tasks import DEFAULT_TARGET_LENGTH, Task


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's three sets, tokenised.

    Columns: `input_ids` and `labels` (ids with the end of sequence, unpadded), `length` (of
    input_ids), and what scoring needs: `source`, `target`, `references` (open answers as the vocabulary
    writes them), `group`. `max_target_length` bounds the labels and what is to be generated, in tokens,
    and was measured where `is_measured`; `notes` says in one line each what was left out, cut or guessed;
    `origins` in a few words what each set was made from.
    """

    train: Dataset | TrainStream
    validation: Dataset
    test: Dataset
    max_target_length: int
    notes: tuple[str, ...]
    origins: dict[str, str]
    is_measured: bool = False


@contextmanager
def cache_faults() -> Iterator[None]:
    """Turn what the disk says of the cache of `datasets` into one line that tells where it may go."""
    try:
        yield
    except OSError as error:
        folder = datasets.config.HF_DATASETS_CACHE
        where = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        raise DataError(
            f"the cache of data sets, {folder}, cannot be written ({where}); set HF_HOME, or "
            "HF_DATASETS_CACHE, to a folder that can"
        ) from None


@cache_faults()
def load_task_data(
    task: Task,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    memory: MemoryData | None = None,
) -> TaskData:
    """Reads a task's rows, splits them, draws `few_shot`, cuts to `max_*_samples` and tokenises, in this order.

    All of it is cached by `datasets`: who does it again finds it there.
    Rows in memory take the place of `data_dir`, files and hub. Raises DataError for a missing or malformed file or row,
    a class that few_shot finds empty, or labels longer than `max_target_length` or that the vocabulary cannot write.
    """
    seed = config.effective_data_seed
    location = locate_data(task, config.data_dir, memory)
    share = config.validation_split or task.validation_split
    splits.check_splits(task, location.splits, share)
    notes = [*location.notes, *order_note(task)]
    parts = {}
    for name in location.splits:
        if name != "train" or not config.streaming:
            parts[name], left_out = well_formed(location, name, config)
            notes += left_out
    is_measured = not (config.max_target_length or task.max_target_length)
    if is_measured:
        task, note = measured(task, parts, tokenizer)
        notes.append(note)
    encoder = Encoder(task, config, tokenizer)
    if config.streaming:
        sets, parts, origins = streamed(location, config, encoder, parts, share)
    else:
        sets = {}
        parts, origins = splits.split(task, parts, seed, share)
    if share:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
        notes.append(f"{task.name}: {sizes} examples by validation_split {share}, seed {seed}")
    if config.few_shot is not None:
        parts["train"], fewer = splits.few_shot(task, parts["train"], config.few_shot, seed)
        notes += fewer
        origins["train"] = f"few_shot {config.few_shot} of {origins['train']}"
    for name, examples in parts.items():
        sets[name], cut, origins[name] = encode(examples, name, origins[name], encoder, config)
        notes += cut
    return TaskData(
        origins=origins,
        **sets,
        max_target_length=encoder.max_target_length,
        notes=tuple(notes),
        is_measured=is_measured,
    )


@cache_faults()
def load_split(
    task: Task,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    memory: MemoryData | None = None,
) -> tuple[Dataset, tuple[str, ...], str]:
    """One of the sets that `load_task_data` gives, its notes and its origin; no other split has to be there,
    unless `few_shot` draws the training set.

    Where there is nothing to train on, a split is what its files or the hub give: the split rule
    needs the training set. Raises DataError as `load_task_data`, and where the split is missing.
    """
    location = locate_data(task, config.data_dir, memory)
    share = config.validation_split or task.validation_split
    is_drawn = split == "train" and config.few_shot is not None
    if is_drawn or not is_given_as_is(split, location.splits, share):
        data = load_task_data(task, config, tokenizer, memory)
        return getattr(data, split), data.notes, data.origins[split]
    examples, left_out = well_formed(location, split, config)
    origin, encoder = f"the official {split} set", Encoder(task, config, tokenizer)
    encoded, cut, origin = encode(examples, split, origin, encoder, config)
    return encoded, (*location.notes, *left_out, *cut), origin


def is_given_as_is(split: str, there: Collection[str], validation_split: float | None) -> bool:
    """Whether a split is one that is there, unchanged by the split rule."""
    if validation_split and "train" in there:
        return split == "test" and "test" in there
    has_rule = "train" in there and not {"validation", "test"} <= set(there) and len(there) > 1
    return split in there and (split == "test" or not has_rule)


def order_note(task: Task) -> list[str]:
    """A note where labels are the numbers of other classes: ["1", "0"]."""
    ids = [str(i) for i in range(len(task.labels))]
    if list(task.labels) == ids or sorted(task.labels) != sorted(ids):
        return []
    return [
        f"{task.name}: labels are {', '.join(task.labels)} in this order; a number in a row is the label of that "
        "name, not the class id"
    ]


def measured(
    task: Task, parts: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase
) -> tuple[Task, str]:
    """A task of open answers with the longest target of its data for `max_target_length`, and a note on it.

    The test set is not looked at. A training set that is a stream is not among the parts.
    """
    known = {name: part for name, part in parts.items() if name != "test"} or dict(parts)
    lengths = [0]
    for part in known.values():
        texts = part["references"] if task.train_on_every_answer else [[t] for t in part["target"]]
        flat = list(dict.fromkeys(text for each in texts for text in each))
        if flat:
            lengths += encode_targets(flat, tokenizer, max_length=MOST_MEASURED)[1]
    longest = max(lengths)
    length = min(max(longest, DEFAULT_TARGET_LENGTH), MOST_MEASURED)
    note = (
        f"{task.name}: max_target_length is {length}; the longest target of {' and '.join(known)} has {longest} "
        "tokens"
    )
    return replace(task, max_target_length=length), note


def well_formed(location: DataLocation, split: str, config: RunConfig) -> tuple[Dataset, list[str]]:
    """A split's well-formed examples, and notes on what was left out."""
    examples = location.examples(split)
    return splits.well_formed(location.task, split, examples, skip_bad_rows=config.skip_bad_rows)


def encode(
    examples: Dataset, split: str, origin: str, encoder: Encoder, config: RunConfig
) -> tuple[Dataset, list[str], str]:
    """A split with token ids, no larger than the configuration wants it; notes on what is wrong with it; its origin."""
    task, is_train = encoder.task, split == "train"
    field = "max_train_samples" if is_train else "max_eval_samples"
    maximum = getattr(config, field)
    chosen = splits.limit_examples(task, examples, maximum, config.effective_data_seed)
    if chosen is not examples:
        origin = f"{field} {maximum} of the {len(examples)} of {origin}"
    encoded = encoder.encode(chosen, every_answer=is_train and task.train_on_every_answer)
    stats = encoder.stats(split)
    stats.add(encoded)
    return encoded.remove_columns([*FLAGS, "target_length"]), stats.notes(), origin


def streamed(
    location: DataLocation,
    config: RunConfig,
    encoder: Encoder,
    given: Mapping[str, Dataset],
    share: float | None,
) -> tuple[dict[str, Any], dict[str, Dataset], dict[str, str]]:
    """The training set as a stream; validation and test by the rule for large tasks; and what each was made from.

    With both given they stay; otherwise the one that is there is the test set, and the stream's first
    examples are validation, to the end of the last one's group.
    """
    if share:
        raise DataError("validation_split: does not go with streaming; leave one of them out")
    task = location.task
    stream = TrainStream(location, encoder, skip_bad_rows=config.skip_bad_rows)
    origins = {name: f"the official {name} set" for name in ("train", *given)}
    origins["train"] = f"a stream of {origins['train']}"
    if len(given) == 2:
        return {"train": stream}, dict(given), origins
    first: list[dict[str, Any]] = []
    for row in stream.well_formed():
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
    ((only, test),) = given.items()
    origins |= {
        "validation": f"the first {len(first)} of the official train set",
        "test": origins[only],
    }
    validation = Dataset.from_list(first, features=test.features)
    return {"train": stream}, {"validation": validation, "test": test}, origins


def lengths_of(dataset: Dataset) -> np.ndarray:
    """The number of source tokens of every example, [N]."""
    return np.asarray(dataset["length"][:], dtype=np.int64)
