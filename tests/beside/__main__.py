"""The published code beside ours, as a table: docs/evidence.md tells what is needed and what it says.

python -m tests.beside CHECKOUT --python PYTHON [--sizes t5-small t5-base] [--rounds 4] [--threads 2]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pemt.plan import KNOWN
from tests.beside.measure import HEAD, Row, line, measure
from tests.beside.process import BesideError, Worker, check_published
from tests.beside.start import measure_start
from tests.beside.world import write_world

SIZES = ["t5-small", "t5-base", "t5-large"]
START_ROUNDS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured; 1: it could not be, or the codes do not agree."""
    parser = argparse.ArgumentParser(prog="python -m tests.beside", description=__doc__)
    parser.add_argument("checkout", type=Path, help="of the published code, changed as told")
    parser.add_argument("--python", required=True, help="a Python that runs it")
    parser.add_argument("--sizes", nargs="+", default=SIZES[:2], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    options.python = os.path.abspath(shutil.which(options.python) or options.python)
    try:
        check_published(options.checkout, options.python)
        for size in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                for row in measure_size(size, Path(folder), options):
                    print(line(row), flush=True)
    except BesideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure_size(size: str, world: Path, options: argparse.Namespace) -> Iterator[Row]:
    """All rows of one size; before them the table's head is printed."""
    write_world(world, KNOWN[size])
    published = {"checkout": options.checkout, "python": options.python}
    with (
        Worker("theirs", world, threads=options.threads, **published) as theirs,
        Worker("ours", world, threads=options.threads) as ours,
    ):
        sides = {"theirs": theirs.ask, "ours": ours.ask}
        _tell(size, {name: ask("hello") for name, ask in sides.items()}, options.rounds)
        yield from measure(size, sides, rounds=options.rounds)
    yield measure_start(size, world, threads=options.threads, rounds=START_ROUNDS, **published)


def _tell(size: str, versions: dict[str, dict[str, object]], rounds: int) -> None:
    print(f"\n{size}, {datetime.date.today()}, {platform.machine()}, {rounds} rounds")
    for side, told in versions.items():
        print(f"  {side}: {', '.join(f'{key} {value}' for key, value in told.items())}")
    print(f"\n{HEAD}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
