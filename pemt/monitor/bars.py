"""Progress bars of training and evaluation on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time

import datasets
import transformers
from tqdm.auto import tqdm

from pemt.monitor.progress import progress_logger

SECONDS_A_LINE = 30.0  # of an evaluation, where stdout is no terminal


def quiet_libraries(is_main: bool) -> None:
    """No progress bars of `datasets` and `transformers` where nobody looks: in files, on other ranks."""
    if not (is_main and _on_terminal()):
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _on_terminal() -> bool:
    """Whether a bar can be seen; a service without a console has no stdout at all."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if type(shell).__name__ == "ZMQInteractiveShell":
        return True  # a notebook's stdout is no terminal, and yet somebody looks
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    with contextlib.suppress(OSError, ValueError):  # none of the system's
        # tqdm draws nothing, and says nothing, where a terminal tells no width: some containers' do not
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0
    return True


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
            disable=not _on_terminal(),
            dynamic_ncols=True,
        )

    def advance(self, step: int, *, loss: float, samples_per_second: float) -> None:
        """Move the bar to `step`, or log a line about it."""
        if self._bar.disable:
            progress_logger().info(self._line(step, loss, samples_per_second))
        else:
            self._bar.set_postfix_str(
                f"loss {loss:.4f}, {_rate(samples_per_second)}", refresh=False
            )
            self._bar.update(step - self._bar.n)

    def _line(self, step: int, loss: float, samples_per_second: float) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / max(step - self._initial_step, 1) * (self._total_steps - step)
        return (
            f"{self._description}: step {step}/{self._total_steps}, loss {loss:.4f}, "
            f"{_rate(samples_per_second)}, {tqdm.format_interval(left)} left"
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def _rate(samples_per_second: float) -> str:
    digits = ".1f" if samples_per_second >= 1 else ".2g"  # a large model may take a minute a step
    return f"{samples_per_second:{digits}} samples/s"


class EvaluationBar:
    """A bar over examples on stdout, gone when it is done; where stdout is no terminal, a line now and then.

    Args:
        total: examples in all.
        description: a few words before the bar and before each line.
        shown: false on other ranks than 0.
    """

    def __init__(self, *, total: int, description: str, shown: bool) -> None:
        self._description, self._shown = description, shown
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=description,
            unit="example",
            file=sys.stdout,
            disable=not (shown and _on_terminal()),
            dynamic_ncols=True,
            leave=False,
            delay=0.5,  # a short one would only flicker
        )
        self._started, self._done, self._total = self._last_line, 0, total

    def advance(self, count: int) -> None:
        """`count` more examples are done; the last batch may hold some twice."""
        count = min(count, self._total - self._done)
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and self._shown and now - self._last_line >= SECONDS_A_LINE:
            self._last_line = now
            rate = self._done / (now - self._started)
            left = tqdm.format_interval((self._total - self._done) / rate)
            with contextlib.suppress(OSError):  # on a full disk; one rank alone must not end here
                progress_logger().info(
                    f"{self._description}: {self._done}/{self._total} examples, {rate:.1f} examples/s, {left} left"
                )

    def __enter__(self) -> EvaluationBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
