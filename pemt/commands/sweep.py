"""`pemt sweep`: methods × tasks × seeds."""

from __future__ import annotations

from pemt.config import Parser, command_parser, sweep_file
from pemt.engine import importing_libraries


def run(arguments: list[str]) -> None:
    """`pemt sweep`."""
    path = sweep_file(make_parser().parse_args(arguments).config)
    with importing_libraries():
        from pemt.sweep import read_sweep
    sweep = read_sweep(path)
    with importing_libraries():
        from pemt.sweep import run_sweep
    run_sweep(sweep)


def make_parser() -> Parser:
    """The command line of `pemt sweep`."""
    parser = command_parser(
        "sweep",
        "Methods × tasks × seeds from one YAML, one run after another on the launcher at hand.\n"
        "The same command takes it up where it stopped. docs/methods.md shows such a YAML.",
        "pemt sweep --config sweep.yaml",
        "pemt sweep --config paper_full",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the sweep; paper_full and paper_few_shot come with pemt",
    )
    return parser
