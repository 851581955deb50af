"""Steps that all ranks skip because of a non-finite loss or gradient on one: logged, counted, limited."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pemt.config import PemtError
from pemt.engine import Engine
from pemt.monitor import progress_logger


class NonFiniteError(PemtError):
    """Too many steps in a row gave no finite loss and gradient."""


class NonFiniteGuard:
    """Counts skipped steps in a row, alike on all ranks, and stops the run at the limit.

    Args:
        engine: the run's; `output_dir` receives `not-finite-step-<step>-rank-<rank>.jsonl`.
        rows_of: the examples of a micro-batch, which are saved for inspection.
        log: logs a line.
    """

    def __init__(
        self,
        engine: Engine,
        rows_of: Callable[[list[Any]], list[dict[str, Any]]],
        *,
        log: Callable[[str], None],
    ) -> None:
        self._output_dir = Path(engine.config.output_dir)
        self._limit = engine.config.max_skipped_steps
        self._engine = engine
        self._rows_of = rows_of
        self._log = log
        self._in_a_row = 0

    def check(
        self, step: int, grad_norm: float, micro_batches: list[list[Any]], losses: list[Tensor]
    ) -> bool:
        """Look at a step that was taken (all ranks call).

        Args:
            grad_norm: what `Engine.step` gave, the same on every rank.
            micro_batches, losses: this rank's share of the step.

        Returns:
            Whether it was skipped.

        Raises:
            NonFiniteError: the limit is reached; every rank has saved its batch.
        """
        if math.isfinite(grad_norm):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        if self._in_a_row >= self._limit:
            raise self._end(step, micro_batches, losses)
        self._log(
            f"step {step}: non-finite loss or gradient: step skipped "
            f"({self._in_a_row} of {self._limit} in a row)"
        )
        return True

    def _end(
        self, step: int, micro_batches: list[list[Any]], losses: list[Tensor]
    ) -> NonFiniteError:
        values = torch.stack(losses).float()
        # gloo and NCCL gather equal shapes, and every rank has equally many micro-batches
        losses_RM = self._engine.gather(values[None]).cpu()
        self._save(step, micro_batches, values.tolist())
        self._engine.barrier()
        guilty = [rank for rank, row_M in enumerate(losses_RM) if not row_M.isfinite().all()]
        if guilty:
            worst = float(losses_RM[~losses_RM.isfinite()][0])
            what = f"the loss is {worst} on rank {', '.join(map(str, guilty))}"
        else:
            what = "every rank's loss is finite, the gradient is not"
        path = self._path(step, guilty[0] if guilty else 0)
        return NonFiniteError(
            f"{path}: holds the batch of step {step}, the last of {self._in_a_row} skipped steps in a row "
            f"(max_skipped_steps): {what}; inspect the file, lower learning_rate, "
            "or train in fp32"
        )

    def _path(self, step: int, rank: int) -> Path:
        return self._output_dir / f"not-finite-step-{step}-rank-{rank}.jsonl"

    def _save(self, step: int, micro_batches: list[list[Any]], losses: list[float]) -> None:
        """This rank's share of the step, a line an example."""
        lines = []
        for number, (micro_batch, loss) in enumerate(zip(micro_batches, losses, strict=True)):
            for index, row in zip(micro_batch, self._rows_of(micro_batch), strict=True):
                line: dict[str, Any] = {
                    "micro_batch": number,
                    "loss": loss if math.isfinite(loss) else str(loss),
                    "index": index if isinstance(index, int) else None,  # a stream's rows have none
                    **{key: row[key] for key in ("source", "target", "input_ids", "labels")},
                }
                lines.append(json.dumps(line) + "\n")
        path = self._path(step, self._engine.rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")
        except OSError as error:  # the run ends anyway, and with the true reason
            progress_logger().warning(f"{path}: cannot be written: {error.strerror}")
