"""`pemt ops`: build the fused op, or describe it."""

from __future__ import annotations

from pemt.config import Parser, PemtError, command_parser


def run(arguments: list[str]) -> None:
    """`pemt ops build` and `pemt ops info`."""
    verb = make_parser().parse_args(arguments).verb
    from pemt.ops import OpsError, build

    try:
        print("\n".join(build.build_all() if verb == "build" else build.describe()))
    except OpsError as error:
        raise PemtError(str(error)) from None


def make_parser() -> Parser:
    """The command line of `pemt ops`."""
    parser = command_parser("ops", "The fused op.", "pemt ops build", "pemt ops info")
    parser.add_argument(
        "verb", choices=["build", "info"], help="compile it now; tell what would run and why"
    )
    return parser
