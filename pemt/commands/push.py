"""`pemt push`: an exported run to the hub."""

from __future__ import annotations

from pemt.config import Parser, command_parser


def run(arguments: list[str]) -> None:
    """`pemt push`."""
    options = vars(make_parser().parse_args(arguments))
    from pemt.publish import push_folder

    print(push_folder(**options))


def make_parser() -> Parser:
    """The command line of `pemt push`."""
    parser = command_parser(
        "push",
        "Push what `pemt export` wrote to the Hugging Face hub, as one commit.",
        "pemt push cb-export me/flan-t5-base-cb",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("repo_id", metavar="OWNER/NAME", help="made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if it is made now")
    parser.add_argument("--message", default="pemt export", help="of the commit")
    return parser
