"""`pemt pull`: a pushed run into a folder."""

from __future__ import annotations

from pathlib import Path

from pemt.config import Parser, command_parser


def run(arguments: list[str]) -> None:
    """`pemt pull`."""
    options = make_parser().parse_args(arguments)
    from pemt.storage import download

    print(download(options.repo, Path(options.folder), revision=options.revision))


def make_parser() -> Parser:
    """The command line of `pemt pull`."""
    parser = command_parser(
        "pull", "Fetch what was pushed into a folder.", "pemt pull me/flan-t5-base-cb cb-adapter"
    )
    parser.add_argument("repo", metavar="OWNER/NAME")
    parser.add_argument("folder", metavar="DIR", help="new or empty")
    parser.add_argument("--revision", help="branch, tag or commit")
    return parser
