"""`pemt push`: an exported run to the hub."""

from __future__ import annotations

from pathlib import Path

from pemt.config import Parser, PemtError, command_parser

WHOLE_MODEL = "config.json"


def run(arguments: list[str]) -> None:
    """`pemt push`."""
    options = make_parser().parse_args(arguments)
    from pemt.publish import CONFIG
    from pemt.storage import upload

    folder = options.folder
    if not any((folder / name).is_file() for name in (CONFIG, WHOLE_MODEL)):
        raise PemtError(f"{folder}: holds no {CONFIG}; give a folder that `pemt export` wrote")
    print(upload(folder, options.repo_id, private=options.private, message=options.message))


def make_parser() -> Parser:
    """The command line of `pemt push`."""
    parser = command_parser(
        "push",
        "Push what `pemt export` wrote to the Hugging Face hub, as one commit.",
        "pemt push cb-export me/flan-t5-base-cb",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if it is made now")
    parser.add_argument("--message", default="pemt export", help="of the commit")
    return parser
