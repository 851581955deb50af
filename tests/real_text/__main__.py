"""PEMT on real text: a small T5 pre-trained here, experts of four sources, four few-shot targets.

python -m tests.real_text DATA [--output_dir runs/real_text] [--rows pemt adapter ...]

DATA holds GLUE, SuperGLUE and Yelp files as docs/evidence.md lists them. Interrupted, the same command goes on: a base
that is there is kept, and so are finished runs. Several processes may take a row each once the bank is full.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pemt.demo.evidence_report import Outcome, write_evidence
from tests.real_text.pretraining import pretrain
from tests.real_text.rows import ROWS, train
from tests.real_text.texts import SOURCES, TARGETS, write_task


def main(arguments: Sequence[str] | None = None) -> int:
    """Pre-train, train the sources, then the rows; print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.real_text", description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/real_text"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args(arguments)
    folder = options.output_dir
    for each in (*SOURCES, *TARGETS):
        write_task(each, options.data, folder / "data" / each.name, seed=0)
    if not (folder / "base").exists():
        pretrain(options.data, folder / "base")
    outcomes = [Outcome.of(row, 0, run) for row in options.rows for run in train(row, folder)]
    write_evidence(outcomes, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
