"""`pemt bench`: the fused op, a training step and answering, timed."""

from __future__ import annotations

import argparse

from pemt.config import Parser, command_parser


def run(arguments: list[str]) -> None:
    """`pemt bench op`, `pemt bench step` and `pemt bench generate`."""
    options = vars(make_parser().parse_args(arguments))
    options.pop("run")(**options)


def make_parser() -> Parser:
    """The command line of `pemt bench`."""
    from pemt.bench import generate, op, step

    parser = command_parser(
        "bench",
        "Time the fused op, a whole training step, or answering.",
        "pemt bench step --size t5-small",
        "pemt bench op --help",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb, bench in (("op", op), ("step", step), ("generate", generate)):
        own = bench.make_parser()
        about = (own.description or verb).split("\n")[0]
        verbs.add_parser(
            verb,
            parents=[own],
            add_help=False,
            allow_abbrev=False,
            help=about.partition(": ")[2].rstrip("."),
            description=own.description,
            epilog=own.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).set_defaults(run=bench.run)
    return parser
