"""What a run tells while it trains, from rank 0: TensorBoard, log.jsonl and one progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import datasets
import transformers
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TENSORBOARD_FOLDER = "tensorboard"
LOG_FILE = "log.jsonl"


def quiet_libraries(is_main: bool) -> None:
    """No progress bars of `datasets` and `transformers` where nobody looks: in files, on other ranks."""
    if not (is_main and sys.stdout.isatty()):
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class Monitor:
    """Scalars and progress of one run; use it in a `with` block.

    Every rank may call every method; on ranks other than the main one nothing is written.

    Args:
        output_dir: the run's folder; `tensorboard/` and `log.jsonl` are made in it.
        total_steps: optimizer steps of the whole run.
        initial_step: steps already taken by the run that this one resumes. What was logged after
            that step is dropped, since it will be logged again.
        is_main: whether this rank is the one that writes.
        description: a few words before the bar and before each line.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        initial_step: int = 0,
        is_main: bool,
        description: str,
    ) -> None:
        self._output_dir = output_dir
        self._total_steps = total_steps
        self._initial_step = initial_step
        self._is_main = is_main
        self._description = description

    def __enter__(self) -> Monitor:
        if self._is_main:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            log_path = self._output_dir / LOG_FILE
            if log_path.exists():
                drop_later_lines(log_path, self._initial_step)
            self._log = log_path.open(
                "a", encoding="utf-8", buffering=1
            )  # a line at a time: survives a crash
            self._tensorboard = SummaryWriter(
                str(self._output_dir / TENSORBOARD_FOLDER), purge_step=self._initial_step + 1
            )
            self._bar = tqdm(
                total=self._total_steps,
                initial=self._initial_step,
                desc=self._description,
                unit="step",
                file=sys.stdout,
                disable=not sys.stdout.isatty(),
                dynamic_ncols=True,
            )
            self._started = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_main:
            self._bar.close()
            self._tensorboard.close()
            self._log.close()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record values under flat tags such as `train/loss`.

        log.jsonl gets one object with `step`, `time` (seconds since 1970) and the tags; a value
        that is not finite stands there as null, as JSON has no word for it.
        """
        if not self._is_main:
            return
        for tag, value in scalars.items():
            self._tensorboard.add_scalar(tag, value, step)
        finite = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        self._log.write(
            json.dumps({"step": step, "time": time.time(), **finite}, allow_nan=False) + "\n"
        )

    def advance(self, step: int, *, loss: float, samples_per_second: float) -> None:
        """Move the bar to `step`; where stdout is no terminal, print a plain line instead."""
        if not self._is_main:
            return
        if self._bar.disable:
            print(self._line(step, loss, samples_per_second), flush=True)
        else:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {samples_per_second:.1f} samples/s", refresh=False
            )
            self._bar.update(step - self._bar.n)

    def _line(self, step: int, loss: float, samples_per_second: float) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / max(step - self._initial_step, 1) * (self._total_steps - step)
        return (
            f"{self._description}: step {step}/{self._total_steps}, loss {loss:.4f}, "
            f"{samples_per_second:.1f} samples/s, {tqdm.format_interval(left)} left"
        )

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def drop_later_lines(log_path: Path, step: int) -> None:
    """Rewrite a log.jsonl without the lines after `step` and without a half-written one."""
    kept = []
    for line in log_path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line)
    rewritten = log_path.with_suffix(".rewritten")
    rewritten.write_text("".join(kept), encoding="utf-8")
    os.replace(rewritten, log_path)
