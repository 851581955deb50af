"""How much each micro-batch counts in its step, and averages of what steps report between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pemt.data import IGNORED_LABEL
from pemt.engine import Engine
from pemt.model import PemtOutput

GATES = "gates"


@dataclass(frozen=True)
class MicroBatchWeight:
    """What a micro-batch is of its step, times the step's micro-batches on all ranks: 1 where all are alike.

    So a mean over micro-batches and ranks, which is what engine and meter take, is one over the step's target
    tokens (`average_tokens_across_devices` in transformers) or samples, however the step is cut.

    Args:
        tokens: by target tokens, for the cross-entropy, which is a mean over them.
        samples: for what is a mean over samples: gates, and the sparsity loss, a product of two such means.
    """

    tokens: float
    samples: float

    def of_loss(self, out: PemtOutput, sparsity_weight: float) -> Tensor:
        """What to take the gradient of: cross-entropy · tokens + weight · sparsity · samples.

        `out.loss` is cross-entropy + weight · sparsity already; what its second part lacks is added.
        """
        assert out.loss is not None
        loss = out.loss * self.tokens
        if out.sparsity_loss is None:
            return loss
        return loss + sparsity_weight * out.sparsity_loss * (self.samples - self.tokens)


def micro_batch_weights(
    engine: Engine, batches: Sequence[Mapping[str, Tensor]]
) -> list[MicroBatchWeight]:
    """Of each of this rank's micro-batches of one step (all ranks call, each with as many).

    Args:
        batches: on the CPU, so that no device is waited for.
    """
    counts = [
        (int((each["labels"] != IGNORED_LABEL).sum()), len(each["labels"])) for each in batches
    ]
    micro_batches = len(batches) * engine.world_size
    tokens, samples = engine.totals([sum(column) for column in zip(*counts, strict=True)])
    return [
        MicroBatchWeight(micro_batches * own / max(tokens, 1), micro_batches * rows / samples)
        for own, rows in counts
    ]


class Meter:
    """Sums losses, gates and counts over micro-batches; `read` gives their means over all ranks.

    Nothing is read back from the device until `read`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clear()

    def _clear(self) -> None:
        self._started = time.perf_counter()
        self._micro_batches = 0
        self._sums: dict[str, Tensor] = {}
        # samples, tokens, source tokens, and positions that these are padded to
        self._counts = np.zeros(4, dtype=np.int64)

    def add(
        self,
        out: PemtOutput,
        batch: Mapping[str, Tensor],
        weight: MicroBatchWeight,
        step_loss: Tensor,
    ) -> None:
        """Count one micro-batch of this rank, on the CPU, and what was taken the gradient of."""
        self._micro_batches += 1
        self._sum("loss", step_loss, 1.0)
        self._sum("ce_loss", out.ce_loss, weight.tokens)
        self._sum("sparsity_loss", out.sparsity_loss, weight.samples)
        if out.gates_BLK is not None:
            self._sum(GATES, out.gates_BLK.mean(dim=0), weight.samples)
        mask = batch["attention_mask"]
        source_tokens = int(mask.sum())
        tokens = source_tokens + int((batch["labels"] != IGNORED_LABEL).sum())
        self._counts += [len(mask), tokens, source_tokens, mask.numel()]

    def _sum(self, name: str, value: Tensor | None, weight: float) -> None:
        if value is not None:
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * weight

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out of the rates: validation and saving are not training."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def read(self) -> tuple[dict[str, float], Tensor | None]:
        """Scalars by tag and mean gates [L,K] since the last read (all ranks call).

        Losses; samples and tokens a second; `train/padding_waste`, the share of padding among the
        source tokens; memory.
        """
        gates_LK = self._sums.pop(GATES, None)
        if gates_LK is not None:
            gates_LK = self._engine.mean(gates_LK / self._micro_batches).cpu()
        means = self._engine.mean(torch.stack([*self._sums.values()]) / self._micro_batches)
        counts = self._engine.totals(self._counts.tolist())
        samples, tokens, source_tokens, positions = counts
        seconds = time.perf_counter() - self._started
        scalars = {
            f"train/{name}": float(mean) for name, mean in zip(self._sums, means, strict=True)
        }
        scalars["train/samples_per_second"] = samples / seconds
        scalars["train/tokens_per_second"] = tokens / seconds
        scalars["train/padding_waste"] = 1 - source_tokens / positions
        scalars |= self._engine.memory()
        self._clear()
        return scalars, gates_LK
