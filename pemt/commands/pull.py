"""`pemt pull`: a pushed run into a folder."""

from __future__ import annotations

from pathlib import Path

from pemt.config import Parser, command_parser


def run(arguments: list[str]) -> None:
    """`pemt pull`."""
    options = vars(make_parser().parse_args(arguments))
    from pemt.storage import download

    print(download(**options))


def make_parser() -> Parser:
    """The command line of `pemt pull`."""
    parser = command_parser(
        "pull", "Fetch what was pushed into a folder.", "pemt pull me/flan-t5-base-cb cb-adapter"
    )
    parser.add_argument("repo_id", metavar="OWNER/NAME")
    parser.add_argument("folder", type=Path, metavar="DIR", help="new or empty")
    parser.add_argument("--revision", help="branch, tag or commit")
    return parser
