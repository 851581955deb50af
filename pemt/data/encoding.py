"""Examples -> token ids, once: the cache of `datasets` has them the next time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeAlias

from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from pemt.config import RunConfig
from pemt.data.vocabulary import (
    MOST_MEASURED,
    EncodingStats,
    check_labels,
    comparable,
    encode_sources,
    encode_targets,
    is_changed,
    round_trip,
    unknown,
)
from pemt.tasks import Task, longest_target

# Below this many examples one process (whose tokenizer has its own threads) is faster than several.
PARALLEL_FROM = 50_000
MAX_PROCESSES = 8

Columns: TypeAlias = dict[str, list[Any]]


class Encoder:
    """Tokenises examples; the same task, tokenizer and lengths find the cached result."""

    def __init__(self, task: Task, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.workers = config.preprocessing_num_workers
        self.max_target_length = longest_target(task, config.max_target_length)
        self.lengths = (config.max_source_length, self.max_target_length)
        check_labels(task, tokenizer, self.max_target_length)

    def encode(self, examples: Dataset, *, every_answer: bool) -> Dataset:
        """Adds what `encode_batch` does; with `every_answer` a row per reference."""
        processes = self.workers or 1
        if self.workers is None and len(examples) >= PARALLEL_FROM:
            processes = min(MAX_PROCESSES, os.cpu_count() or 1)
        return examples.map(
            self.of_batches(every_answer=every_answer),
            batched=True,
            remove_columns=examples.column_names,
            num_proc=min(processes, len(examples)) if processes > 1 else None,
            new_fingerprint=Hasher.hash(
                [examples._fingerprint, self.identity, self.lengths, every_answer]
            ),
            desc="tokenising",
        )

    def of_batches(self, *, every_answer: bool) -> Callable[[Columns], Columns]:
        """`encode_batch`, to be given a batch alone."""
        return partial(
            encode_batch,
            tokenizer=self.tokenizer,
            lengths=self.lengths,
            every_answer=every_answer,
            open_answers=self.task.kind == "answer",
        )

    def stats(self, split: str) -> EncodingStats:
        """Counts what is wrong with the examples of a split."""
        return EncodingStats(self.task, split, self.tokenizer, self.lengths)

    @cached_property
    def identity(self) -> str:
        """A hash of the tokenizer's tables, without the truncation its last call left there."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return Hasher.hash(self.tokenizer)
        tables = json.loads(backend.to_str())
        tables |= {"truncation": None, "padding": None}
        return Hasher.hash(json.dumps(tables, sort_keys=True))


def encode_batch(
    batch: Columns,
    *,
    tokenizer: PreTrainedTokenizerBase,
    lengths: tuple[int, int],
    every_answer: bool,
    open_answers: bool,
) -> Columns:
    """A batch of examples with their token ids, FLAGS, and the targets' lengths uncut."""
    columns = {name: list(values) for name, values in batch.items()}
    if every_answer:
        pairs = [(i, text) for i, texts in enumerate(columns["references"]) for text in texts]
        columns = {name: [values[i] for i, _ in pairs] for name, values in columns.items()}
        columns["target"] = [text for _, text in pairs]
    sources, cut = encode_sources(columns["source"], tokenizer, max_length=lengths[0])
    targets, target_lengths = encode_targets(columns["target"], tokenizer, max_length=lengths[1])
    different = list(dict.fromkeys(columns["target"]))
    backs = dict(zip(different, round_trip(different, tokenizer), strict=True))
    if open_answers:
        columns["references"] = comparable(columns["references"], tokenizer)
    return {
        **columns,
        "input_ids": sources,
        "labels": targets,
        "length": [len(ids) for ids in sources],
        "source_cut": cut,
        "source_unknown": unknown(sources, tokenizer),
        "target_cut": [length > lengths[1] for length in target_lengths],
        "target_lost": [is_changed(text, backs[text]) for text in columns["target"]],
        "target_length": target_lengths,
    }


def label_ids(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each label of a task, with the end of sequence, in their order."""
    return encode_targets(task.labels, tokenizer, max_length=MOST_MEASURED)[0]
