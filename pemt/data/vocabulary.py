"""What a tokenizer cuts, does not know, or cannot write back: refused for labels, counted for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pemt.data.errors import DataError
from pemt.tasks import Task

# What `encode_batch` says of every example: its source was cut, or has pieces that the vocabulary does not
# know; its target was cut, or is another text once it is decoded.
FLAGS = ("source_cut", "source_unknown", "target_cut", "target_lost")
# Longest target that is taken from the data: one outlier would make every answer's generation as long.
MOST_MEASURED = 256
SHOWN = 60  # characters of the first example


def encode_sources(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of source texts, as the tokenizer begins and ends them, and which of them had to be cut.

    Cut to `max_length` tokens, an end of sequence keeps its place.
    """
    every = tokenizer(list(texts), add_special_tokens=True).input_ids
    is_cut = [len(ids) > max_length for ids in every]
    return [_cut(ids, tokenizer, max_length) for ids in every], is_cut


def encode_targets(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> tuple[list[list[int]], list[int]]:
    """Token ids of answers with the end of sequence, at most `max_length` tokens, and how many each has uncut.

    A T5's tokenizer ends every text so. T5Gemma's begins it instead, with what its decoder starts from anyway.
    """
    if not texts:
        return [], []
    every = tokenizer(list(texts), add_special_tokens=False).input_ids
    ended = [[*ids, tokenizer.eos_token_id] for ids in every]
    return [_cut(ids, tokenizer, max_length) for ids in ended], [len(ids) for ids in ended]


def _cut(ids: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    if len(ids) <= max_length:
        return ids
    end = ids[-1:] if ids[-1] == tokenizer.eos_token_id else []
    return [*ids[: max_length - len(end)], *end]


def round_trip(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each text as an answer that has its token ids reads."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=True).input_ids
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def is_changed(text: str, back: str) -> bool:
    """Whether a text is another one once it is decoded; blanks at its ends aside, which no metric counts."""
    return text.strip() != back.strip()


def comparable(
    references: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[str]]:
    """Accepted answers as this vocabulary writes them: no answer could equal them otherwise.

    One of which nothing would be left stays as it is: an empty answer must not be right.
    """
    backs = iter(round_trip([text for texts in references for text in texts], tokenizer))
    return [
        list(
            dict.fromkeys(
                back if back.strip() else text for text, back in zip(texts, backs, strict=False)
            )
        )
        for texts in references
    ]


def unknown(ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Which inputs hold a piece that the vocabulary does not know, or padding or an end before their own end."""
    strange = {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id} - {None}
    return [
        not strange.isdisjoint(each[:-1] if each[-1:] == [tokenizer.eos_token_id] else each)
        for each in ids
    ]


def check_labels(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse labels that the model could not answer with.

    Raises:
        DataError: one is too long, or decodes to another text, which another label may decode to as well.
    """
    backs = round_trip(task.labels, tokenizer)
    _, lengths = encode_targets(task.labels, tokenizer, max_length=max_length)
    for label, back, length in zip(task.labels, backs, lengths, strict=True):
        if length > max_length:
            raise DataError(
                f"max_target_length: found {max_length}, but label {label!r} of "
                f"task {task.name} has {length} tokens; give {length} or more"
            )
        if back == label:
            continue
        others = [
            f"label {other!r} {'does' if theirs.strip() == back.strip() else 'begins so'}"
            for other, theirs in zip(task.labels, backs, strict=True)
            if other != label and theirs.strip().startswith(back.strip())
        ]
        alike = f", as {others[0]}" if others else ""
        raise DataError(
            f"labels: found {label!r} in task {task.name}, which the base model's vocabulary writes as {back!r}"
            f"{alike}, so that no answer could be right; give a label of other characters, and what the rows call "
            "it in label_names"
        )


class EncodingStats:
    """Counts what was cut or cannot be written in a split, over any number of batches; `lengths` are the longest source
    and target, in tokens.
    """

    def __init__(
        self, task: Task, split: str, tokenizer: PreTrainedTokenizerBase, lengths: tuple[int, int]
    ) -> None:
        self._name, self._tokenizer, self._lengths = f"{task.name}, {split}", tokenizer, lengths
        self._total = self._longest = 0
        self._counts = dict.fromkeys(FLAGS, 0)
        self._first: dict[str, str] = {}

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Examples, as `encode_batch` gives them."""
        lengths = columns["target_length"][:]
        self._total += len(lengths)
        self._longest = max(self._longest, *lengths, 0)
        for flag in FLAGS:
            where = np.flatnonzero(np.asarray(columns[flag][:], dtype=bool))
            self._counts[flag] += len(where)
            if len(where) and flag not in self._first:
                self._first[flag] = columns[flag.partition("_")[0]][int(where[0])]

    def notes(self) -> list[str]:
        """Notes, one line each."""
        longest_source, longest_target = self._lengths
        texts = {
            "source_cut": f"sources are longer than {longest_source} tokens and were cut",
            "source_unknown": "sources contain pieces unknown to this vocabulary; the first: {first}",
            "target_cut": f"targets are longer than {longest_target} tokens and were cut; the longest has "
            f"{self._longest}: raise max_target_length",
            "target_lost": "targets cannot be written by this vocabulary; the first: {first}",
        }
        return [
            f"{self._name}: {self._counts[flag]:,} of {self._total:,} {text.replace('{first}', self._shown(flag))}"
            for flag, text in texts.items()
            if self._counts[flag]
        ]

    def _shown(self, flag: str) -> str:
        """The first example of a kind, around the first character that is not there any more."""
        text = self._first[flag]
        (back,) = round_trip([text], self._tokenizer)
        pairs = enumerate(zip(text, back, strict=False))
        at = next((i for i, (ours, theirs) in pairs if ours != theirs), len(back))
        start = max(0, min(at, len(text)) - SHOWN // 3)
        parts = [
            f"{'…' if start else ''}{each[start : start + SHOWN]!r}{'…' if len(each) > start + SHOWN else ''}"
            for each in (text, back)
        ]
        return " becomes ".join(parts)
