"""`pemt report`: what runs did, as a page and as Markdown."""

from __future__ import annotations

from pathlib import Path

from pemt.config import Parser, PemtError, command_parser


def run(arguments: list[str]) -> None:
    """`pemt report`."""
    options = make_parser().parse_args(arguments)
    from pemt.report import write_report

    folder: Path = options.output_dir or (options.runs[0] if len(options.runs) == 1 else Path())
    try:
        pages = write_report(options.runs, folder)
    except OSError as error:
        raise PemtError(f"output_dir: {folder} cannot be written: {error.strerror}") from None
    print("\n".join(map(str, pages)))


def make_parser() -> Parser:
    """The command line of `pemt report`."""
    parser = command_parser(
        "report",
        "One page about runs: curves, gates, confusion, worst and best examples, cost, configuration.\n"
        "report.html needs no network and runs no script; report.md has the same without the curves.",
        "pemt report runs/cb",
        "pemt report runs/cb-pemt runs/cb-adapter --output_dir runs/compared",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="default: the run's own folder; of several runs, the working directory",
    )
    return parser
