"""`pemt doctor`: whether this machine is ready, and what to do where it is not."""

from __future__ import annotations

from pemt.config import Parser, PemtError, command_parser


def run(arguments: list[str]) -> None:
    """`pemt doctor`."""
    options = make_parser().parse_args(arguments)
    from pemt.commands.readiness import examine

    missing = []
    for finding in examine(probe=not options.no_launch):
        print("\n".join(finding.lines()), flush=True)
        if finding.state == "missing":
            missing.append(finding.what)
    if missing:
        raise PemtError(
            f"a run cannot start here: {', '.join(missing)}; the lines above say what to do"
        )
    print("ready")


def make_parser() -> Parser:
    """The command line of `pemt doctor`."""
    parser = command_parser(
        "doctor",
        "Versions, devices, the fused op, and whether DeepSpeed really runs here;\n"
        "about each thing that is missing, what to do. Exit code 2 where a run could not start.",
        "pemt doctor",
    )
    parser.add_argument(
        "--no_launch", action="store_true", help="do not start DeepSpeed (it takes half a minute)"
    )
    return parser
