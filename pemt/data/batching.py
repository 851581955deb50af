"""Batches of indices: bucketed by length, the same for every way of dividing the work, resumable.

A step's global batch is `world_size * accumulation` micro-batches of up to `batch_size` examples. What
they contain depends on (seed, epoch, batch_size, world_size * accumulation) alone, so 2 ranks and
one process that accumulates 2 micro-batches compute the very same step.

Shape legend: N examples, M micro-batches of an epoch, B examples of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Noise added to the lengths before examples are sorted by them, as a share of the mean length; it costs about as large
# a share of padding. Without any, the batches of texts of many lengths hardly differ between epochs. Tried in order:
NOISES = (0.0, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)
# until at most this share of the pairs in a micro-batch meets again in the next epoch,
MAX_KEPT = 0.2
# or padding would exceed this share of all tokens; for sets that cannot come below it, so many times their least.
MAX_WASTE, MAX_OVER_LEAST = 0.068, 1.15
IGNORED_LABEL = -100  # label of a padded position; PyTorch's cross-entropy leaves it out


class TrainBatches:
    """Training batches of one rank.

    Examples are put in order of length, with as much noise as padding allows so that batches differ from
    epoch to epoch, and cut into global batches whose order is random: micro-batches of one step take
    about equally long on every rank. An epoch shows every example once; where examples do not fill all
    micro-batches, those of the longest have fewer (`sizes_of`). Some are shown twice only where one of them
    would be empty: of fewer examples than a step has micro-batches, or at a batch_size of 1 in a last step
    that is not full.

    Args:
        lengths: source tokens of each example, [N].
        batch_size: examples of a micro-batch, at most.
        accumulation: micro-batches of a rank per optimizer step.
        world_size, rank: how many ranks there are, and which this is.
        seed: the order's seed.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
    ) -> None:
        self.lengths = np.asarray(lengths)
        assert len(self.lengths) > 0, "no examples"
        assert 0 <= rank < world_size, (rank, world_size)
        self.of_a_step = world_size * accumulation
        self.mine = slice(rank * accumulation, (rank + 1) * accumulation)
        self.seed = seed
        self.steps_per_epoch = -(-len(self.lengths) // (batch_size * self.of_a_step))
        self.sizes_M = sizes_of(
            len(self.lengths), batch_size, self.steps_per_epoch * self.of_a_step
        )
        self.noise = self._noise()

    def _noise(self) -> float:
        """The least noise that mixes enough, or the most that padding allows; in tokens."""
        least = self.waste(self.in_order(0, 0.0))
        limit = MAX_WASTE if least <= MAX_WASTE else MAX_OVER_LEAST * least
        chosen = 0.0
        for noise in np.array(NOISES) * self.lengths.mean():
            first, second = (self.in_order(epoch, noise) for epoch in (0, 1))
            if noise and self.waste(first) > limit:
                break
            chosen = float(noise)
            if share_kept_together(first, second) <= MAX_KEPT:
                break
        return chosen

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of indices, a list per step from `start_step` on."""
        order = self.in_order(epoch, self.noise)
        steps = np.random.default_rng([self.seed, epoch, 1]).permutation(self.steps_per_epoch)
        for step in steps[start_step:]:
            every_rank = order[step * self.of_a_step : (step + 1) * self.of_a_step]
            yield [indices_B.tolist() for indices_B in every_rank[self.mine]]

    def steps(self, start: int, end: int) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of every optimizer step from `start` to `end`."""
        epoch, done = divmod(start, self.steps_per_epoch)
        later = chain.from_iterable(map(self.epoch, count(epoch + 1)))
        return islice(chain(self.epoch(epoch, done), later), max(0, end - start))

    def epochs_at(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step / self.steps_per_epoch

    def position(self) -> None:
        """None: the position to resume from follows from the number of steps."""

    def notes(self, *, at_end: bool = True) -> list[str]:
        """Nothing: what was left out was logged before the first step."""
        return []

    def in_order(self, epoch: int, noise: float) -> list[np.ndarray]:
        """The micro-batches of an epoch from short to long."""
        rng = np.random.default_rng([self.seed, epoch, 0])
        # The permutation decides between equal lengths, and who is shown twice.
        order = np.resize(rng.permutation(len(self.lengths)), self.sizes_M.sum())
        noisy_lengths = self.lengths[order] + rng.uniform(-noise, noise, size=len(order))
        order = order[np.argsort(noisy_lengths, kind="stable")]
        return np.split(order, np.cumsum(self.sizes_M)[:-1])

    def waste(self, micro_batches: Sequence[Sequence[int] | np.ndarray]) -> float:
        """Share of source tokens of an epoch that are padding, or of an example's second time."""
        padded = sum(len(each) * self.lengths[each].max() for each in micro_batches)
        return 1 - float(self.lengths.sum() / padded)


def sizes_of(examples: int, batch_size: int, count: int) -> np.ndarray:
    """How many examples each micro-batch of an epoch has, from short texts to long ones, [M].

    What is missing to whole ones is taken from the longest, where a row costs most, but not more than
    half of any: the mean of a small one's losses would weigh its examples too much. Where that is not
    enough, as in a single step less than half full, all are about equally small, of one at least.
    """
    half = batch_size // 2
    missing = count * batch_size - examples
    # Of an odd size, whose half is rounded down, two steps may miss so much; of size 1, any number.
    if missing > count * half:
        return np.maximum(1, (examples + np.arange(count)[::-1]) // count)
    taken_M = np.clip(missing - half * np.arange(count), 0, half)
    return batch_size - taken_M[::-1]


def share_kept_together(
    before: Sequence[Sequence[int] | np.ndarray], after: Sequence[Sequence[int] | np.ndarray]
) -> float:
    """Of the pairs that share a micro-batch of one epoch, the share that does so in another."""
    indices = np.concatenate(before)
    number_after = np.empty(indices.max() + 1, dtype=np.int64)
    number_after[np.concatenate(after)] = batch_numbers(after)
    both = batch_numbers(before) * len(after) + number_after[indices]
    pairs, kept = (pairs_within(each) for each in (batch_numbers(before), both))
    return kept / pairs if pairs else 0.0


def batch_numbers(micro_batches: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """For every index in these, in their order, the number of its micro-batch."""
    return np.repeat(np.arange(len(micro_batches)), [len(each) for each in micro_batches])


def pairs_within(groups: np.ndarray) -> int:
    """How many ordered pairs have the same group."""
    _, sizes = np.unique(groups, return_counts=True)
    return int(np.sum(sizes * (sizes - 1)))


def eval_batches(
    lengths: Sequence[int] | np.ndarray, *, batch_size: int, world_size: int, rank: int
) -> list[list[int]]:
    """Evaluation batches of one rank: lists of indices, longest first.

    Batches are cut before they are dealt to the ranks, so the same examples are padded together
    whatever the number of ranks. Every index occurs; a rank that would run short repeats the last
    batch, so that all have the same number of batches and the scorer keeps one answer per index.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world_size)
    return [batches[min(i * world_size + rank, len(batches) - 1)] for i in range(rounds)]


def collate(
    rows: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Rows, padded on the right, as a batch on a device.

    Args:
        rows: token ids: `input_ids`, and `labels` unless they are only to be answered.

    Returns `input_ids` and `attention_mask` [B, S], `labels` [B, T] with -100 for padding, as
    int64; S and T are the longest row's, rounded up to `pad_to_multiple_of` if it is given.
    """
    multiple_of = pad_to_multiple_of or 1
    input_ids = [row["input_ids"] for row in rows]
    labels = [row.get("labels", []) for row in rows]
    batch = {
        "input_ids": padded(input_ids, pad_token_id, multiple_of),
        "attention_mask": padded([torch.ones(len(ids)) for ids in input_ids], 0, multiple_of),
        "labels": padded(labels, IGNORED_LABEL, multiple_of),
    }
    return to_device(batch, device)


def to_device(batch: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """A batch of the CPU on a device."""
    return {key: value.to(device) for key, value in batch.items()}


def padded(rows: Sequence[Sequence[int] | Tensor], fill: int, multiple_of: int) -> Tensor:
    """Rows as one matrix [B, width]."""
    matrix = pad_sequence(
        [torch.as_tensor(row, dtype=torch.long) for row in rows],
        batch_first=True,
        padding_value=fill,
    )
    return F.pad(matrix, (0, -matrix.shape[1] % multiple_of), value=fill)
