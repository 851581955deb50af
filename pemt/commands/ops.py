"""`pemt ops` and `pemt bench`: the fused op, built and timed."""

from __future__ import annotations

from pemt.commands.parsers import Parser, command_parser
from pemt.config import PemtError


def ops(arguments: list[str]) -> None:
    """`pemt ops build` and `pemt ops info`."""
    verb = ops_parser().parse_args(arguments).verb
    from pemt.ops import OpsError, build

    try:
        print("\n".join(build.build_all() if verb == "build" else build.describe()))
    except OpsError as error:
        raise PemtError(str(error)) from None


def ops_parser() -> Parser:
    """The command line of `pemt ops`."""
    parser = command_parser("ops", "The fused op.", "pemt ops build", "pemt ops info")
    parser.add_argument(
        "verb", choices=["build", "info"], help="compile it now; tell what would run and why"
    )
    return parser


def bench(arguments: list[str]) -> None:
    """`pemt bench op`, `pemt bench step` and `pemt bench generate`."""
    parser = command_parser(
        "bench",
        "Time the fused op, a whole training step, or answering.",
        "pemt bench step --size t5-small",
        "pemt bench op --help",
    )
    parser.add_argument("what", choices=["op", "step", "generate"])
    what = parser.parse_args(arguments[:1]).what
    if what == "op":
        from pemt.bench.op import main
    elif what == "step":
        from pemt.bench.step import main
    else:
        from pemt.bench.generate import main
    main(arguments[1:])
