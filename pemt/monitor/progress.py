"""One progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

import datasets
import transformers
from tqdm import tqdm


def quiet_libraries(is_main: bool) -> None:
    """No progress bars of `datasets` and `transformers` where nobody looks: in files, on other ranks."""
    if not (is_main and sys.stdout.isatty()):
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class ProgressBar:
    """A run's bar on stdout, with rate, time left and loss; where stdout is no terminal, lines.

    Args:
        total_steps: optimizer steps of the whole run.
        initial_step: steps already taken by the run that this one resumes.
        description: a few words before the bar and before each line.
    """

    def __init__(self, *, total_steps: int, initial_step: int, description: str) -> None:
        self._total_steps = total_steps
        self._initial_step = initial_step
        self._description = description
        self._started = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=initial_step,
            desc=description,
            unit="step",
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            dynamic_ncols=True,
        )

    def advance(self, step: int, *, loss: float, samples_per_second: float) -> None:
        """Move the bar to `step`, or print a line about it."""
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
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
