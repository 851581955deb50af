"""`pemt demo`: both stages on a small world."""

from __future__ import annotations

import os
from pathlib import Path

from pemt.config import Parser, PemtError, command_parser
from pemt.engine import LIBRARIES, StopSignals, importing_libraries, own_cache

EVIDENCE_WORLDS = (2, 3, 4, 5)


def run(arguments: list[str]) -> None:
    """`pemt demo`."""
    options = make_parser().parse_args(arguments)
    world, cache_dir = options.world_seed, options.cache_dir or Path(own_cache())
    if world is not None and world < 0:
        raise PemtError(f"--world_seed: found {world}, a number from 0 on is needed")
    if options.evidence and options.quick:
        raise PemtError("--quick: found beside --evidence, which has one length; leave one out")
    if options.evidence and os.environ.get("WORLD_SIZE", "1") != "1":
        raise PemtError(
            f"--evidence: found {os.environ['WORLD_SIZE']} ranks, it runs in one process; start `pemt demo --evidence` "
            "without a launcher, for several processes each with a --world_seed of its own"
        )
    with StopSignals():
        if os.environ.get("RANK", "0") == "0":
            print(f"--- {LIBRARIES}", flush=True)
        with importing_libraries():
            from pemt.demo import run_demo, run_evidence

        if options.evidence:
            worlds = EVIDENCE_WORLDS if world is None else (world,)
            run_evidence(options.output_dir, cache_dir, worlds=worlds)
        else:
            run_demo(options.output_dir, cache_dir, quick=options.quick, world_seed=world or 0)


def make_parser() -> Parser:
    """The command line of `pemt demo`."""
    parser = command_parser(
        "demo",
        "Both stages on a small world that fits a laptop.",
        "pemt demo --quick --output_dir runs/demo",
        "pemt demo --evidence --output_dir runs/evidence",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="(runs/demo)")
    parser.add_argument(
        "--cache_dir", type=Path, help="keeps the base model it has pre-trained (~/.cache/pemt)"
    )
    parser.add_argument("--quick", action="store_true", help="one target and one seed")
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="PEMT beside controls and baselines: 8 rows, 2 targets, 5 seeds, learning rates chosen on validation",
    )
    parser.add_argument(
        "--world_seed",
        type=int,
        help=f"another one makes another world of the kind (0; with --evidence: {EVIDENCE_WORLDS})",
    )
    return parser
