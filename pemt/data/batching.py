"""Batches of indices: bucketed by length, the same for every way of dividing the work, resumable.

A step's global batch is `world_size * accumulation` micro-batches of `batch_size` examples. What
they contain depends on (seed, epoch, batch_size, world_size * accumulation) alone, so 2 ranks and
one process that accumulates 2 micro-batches compute the very same step.

Shape legend: N examples, S steps of an epoch, M micro-batches of a step, B examples of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How far an example may move from its place in the order of lengths, in micro-batches; the first
# that keeps padding under MAX_WASTE is taken. Without any, batches hardly differ between epochs.
BLURS = (0.5, 0.2, 0.1, 0.0)
MAX_WASTE = 0.06
IGNORED = -100  # label of a padded position; PyTorch's cross-entropy leaves it out


class TrainBatches:
    """Training batches of one rank.

    Examples are put in order of length, blurred as far as padding allows so that batches differ
    from epoch to epoch, and cut into global batches whose order is random: micro-batches of one
    step take about equally long on every rank. All examples of an epoch are seen; the last global
    batch is filled up with some of the longest a second time, where a fuller batch saves most.

    Args:
        lengths: source tokens of each example, [N].
        batch_size: examples of a micro-batch.
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
        micro_batches = world_size * accumulation
        self.mine = slice(rank * accumulation, (rank + 1) * accumulation)
        self.seed = seed
        self.steps_per_epoch = -(-len(self.lengths) // (batch_size * micro_batches))
        self.shape_SMB = (self.steps_per_epoch, micro_batches, batch_size)
        self.blur = next(
            (blur for blur in BLURS if self.waste(self.in_order(0, blur)) <= MAX_WASTE), BLURS[-1]
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of indices, a list per step from `start_step` on."""
        order_SMB = self.in_order(epoch, self.blur)
        steps = np.random.default_rng([self.seed, epoch, 1]).permutation(self.steps_per_epoch)
        for step in steps[start_step:]:
            yield order_SMB[step, self.mine].tolist()

    def steps(self, start: int, end: int) -> Iterator[list[list[int]]]:
        """This rank's micro-batches of every optimizer step from `start` to `end`."""
        step = start
        while step < end:
            epoch, done = divmod(step, self.steps_per_epoch)
            for micro_batches in self.epoch(epoch, start_step=done):
                yield micro_batches
                step += 1
                if step == end:
                    return

    def epochs_at(self, step: int) -> float:
        """Passes over the data after so many steps."""
        return step / self.steps_per_epoch

    def position(self) -> None:
        """Nothing: where to go on follows from the number of steps."""

    def notes(self) -> list[str]:
        """Nothing: what was left out was told before the first step."""
        return []

    def in_order(self, epoch: int, blur: float) -> np.ndarray:
        """The micro-batches of an epoch from short to long, [S, M, B]."""
        rng = np.random.default_rng([self.seed, epoch, 0])
        total, batch_size = int(np.prod(self.shape_SMB)), self.shape_SMB[-1]
        # The permutation decides between equal lengths.
        order = rng.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        missing = total - len(order)
        longest = rng.permutation(order[-max(batch_size, missing) :])
        order = np.concatenate([order, np.resize(longest, missing)])
        order = order[np.argsort(self.lengths[order], kind="stable")]
        reach = blur * batch_size
        places = np.arange(total) + rng.uniform(-reach, reach, size=total)
        return order[np.argsort(places)].reshape(self.shape_SMB)

    def waste(self, order_SMB: np.ndarray) -> float:
        """Share of padding among the source tokens of these micro-batches."""
        lengths_SMB = self.lengths[order_SMB]
        return 1 - lengths_SMB.sum() / (lengths_SMB.max(axis=-1).sum() * order_SMB.shape[-1])


class EvalBatches:
    """Evaluation batches of one rank: lists of indices, longest first.

    Batches are cut before they are dealt to the ranks, so the same examples are padded together
    whatever the number of ranks. Every index occurs; a rank that would run short repeats the last
    batch, so that all have the same number of batches and the scorer keeps one answer per index.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        world_size: int,
        rank: int,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rounds = -(-len(batches) // world_size)
        self.mine = [batches[min(i * world_size + rank, len(batches) - 1)] for i in range(rounds)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.mine)

    def __len__(self) -> int:
        return len(self.mine)


def collate(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Pads rows on the right.

    Returns `input_ids` and `attention_mask` [B, S], `labels` [B, T] with -100 for padding, as
    int64; S and T are the longest row's, rounded up to `pad_to_multiple_of` if it is given.
    """
    multiple_of = pad_to_multiple_of or 1
    input_ids, lengths = padded([row["input_ids"] for row in rows], pad_token_id, multiple_of)
    labels, _ = padded([row["labels"] for row in rows], IGNORED, multiple_of)
    mask = torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": labels}


def padded(rows: Sequence[Sequence[int]], fill: int, multiple_of: int) -> tuple[Tensor, Tensor]:
    """Rows as one matrix [B, width], and their lengths [B]."""
    longest = max(len(row) for row in rows)
    width = -(-longest // multiple_of) * multiple_of
    matrix = torch.full((len(rows), width), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return matrix, torch.tensor([len(row) for row in rows])
