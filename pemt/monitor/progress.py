"""Progress through `logging`: lines with time and rank on stdout, above a bar where there is one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

FORMAT = "[%(asctime)s rank %(rank)s] %(message)s"


class _AboveBars(logging.Handler):
    """Writes to whatever stdout is at that moment; an OSError is the caller's, who knows what a full disk means."""

    stream = "stdout"

    def emit(self, record: logging.LogRecord) -> None:
        record.rank = os.environ.get("RANK", "0")
        file = getattr(sys, self.stream)
        if file is not None:  # a service without a console has none
            tqdm.write(self.format(record), file=file)
            file.flush()


def progress_logger() -> logging.Logger:
    """The logger `pemt`; whoever has given it handlers of their own keeps these alone."""
    logger = logging.getLogger("pemt")
    if not logger.handlers:
        handler = _AboveBars()
        handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # or a root handler would write each line twice
    return logger


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Within the block progress goes to stderr, because stdout is for the command's answers."""
    _AboveBars.stream = "stderr"
    try:
        yield
    finally:
        _AboveBars.stream = "stdout"
