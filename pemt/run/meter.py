"""Averages what training steps report, between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pemt.engine import Engine
from pemt.model import PemtOutput


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
        self._losses: dict[str, Tensor] = {}
        self._gates_LK: Tensor | None = None
        self._samples = torch.zeros((), device=self._engine.device)
        self._tokens = torch.zeros((), device=self._engine.device)
        self._real, self._places = torch.zeros((), device=self._engine.device), 0

    def add(self, out: PemtOutput, batch: Mapping[str, Tensor]) -> None:
        """Count one micro-batch of this rank."""
        self._micro_batches += 1
        for name in ("loss", "ce_loss", "sparsity_loss"):
            value = getattr(out, name)
            if value is not None:
                self._losses[name] = self._losses.get(name, 0.0) + value.detach().float()
        if out.gates_LBK is not None:
            gates_LK = out.gates_LBK.float().mean(dim=1)
            self._gates_LK = gates_LK if self._gates_LK is None else self._gates_LK + gates_LK
        self._samples += len(batch["input_ids"])
        real = batch["attention_mask"].sum()
        self._tokens += real + (batch["labels"] >= 0).sum()
        self._real += real
        self._places += batch["attention_mask"].numel()

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
        names = list(self._losses)
        means = self._engine.mean(
            torch.stack([self._losses[name] for name in names]) / self._micro_batches
        )
        places = torch.full_like(self._real, self._places)
        counts = self._engine.sum(torch.stack([self._samples, self._tokens, self._real, places]))
        seconds = time.perf_counter() - self._started
        scalars = {f"train/{name}": float(mean) for name, mean in zip(names, means, strict=True)}
        scalars["train/samples_per_second"] = float(counts[0]) / seconds
        scalars["train/tokens_per_second"] = float(counts[1]) / seconds
        scalars["train/padding_waste"] = 1 - float(counts[2] / counts[3])
        scalars |= self._engine.memory()
        gates_LK = (
            None
            if self._gates_LK is None
            else self._engine.mean(self._gates_LK / self._micro_batches).cpu()
        )
        self._clear()
        return scalars, gates_LK
