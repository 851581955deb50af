"""`pemt demo`: both stages on a small world."""

from __future__ import annotations

import os
from pathlib import Path

from pemt.config import Parser, PemtError, command_parser
from pemt.engine import LIBRARIES, StopSignals, own_cache, telling


def run(arguments: list[str]) -> None:
    """`pemt demo`."""
    options = vars(make_parser().parse_args(arguments))
    options["cache_dir"] = options["cache_dir"] or Path(own_cache())
    if options["world_seed"] < 0:
        raise PemtError(
            f"--world_seed: found {options['world_seed']}, a number from 0 on is needed"
        )
    with StopSignals():
        if os.environ.get("RANK", "0") == "0":
            print(f"--- {LIBRARIES}", flush=True)
        with telling(LIBRARIES):
            from pemt.demo import run_demo

        run_demo(**options)


def make_parser() -> Parser:
    """The command line of `pemt demo`."""
    parser = command_parser(
        "demo",
        "Both stages on a small world that fits a laptop.",
        "pemt demo --quick --output_dir runs/demo",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="(runs/demo)")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help="keeps the base model it has pre-trained (~/.cache/pemt)",
    )
    parser.add_argument("--quick", action="store_true", help="one target and one seed")
    parser.add_argument(
        "--world_seed", type=int, default=0, help="another one makes another world of the kind (0)"
    )
    return parser
