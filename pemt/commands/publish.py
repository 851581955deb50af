"""`pemt export`, `pemt push`, `pemt pull`: a finished run, for others."""

from __future__ import annotations

from pemt.commands.parsers import Parser, command_parser

DTYPES = ("float32", "bfloat16", "float16")


def export(arguments: list[str]) -> None:
    """`pemt export`."""
    options = vars(export_parser().parse_args(arguments))
    from pemt.publish.export import export_run

    folder = export_run(**options)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{folder}: {size / 2**20:.1f} MiB; read its README.md, then `pemt push {folder} OWNER/NAME`"
    )


def push(arguments: list[str]) -> None:
    """`pemt push`."""
    options = push_parser().parse_args(arguments)
    from pemt.publish.transfer import push_folder

    print(
        push_folder(options.folder, options.repo, private=options.private, message=options.message)
    )


def pull(arguments: list[str]) -> None:
    """`pemt pull`."""
    options = pull_parser().parse_args(arguments)
    from pemt.publish.transfer import pull_folder

    print(pull_folder(options.repo, options.folder, revision=options.revision))


def export_parser() -> Parser:
    """The command line of `pemt export`."""
    parser = command_parser(
        "export",
        "Write a finished run as a folder for others: adapter, model card, picture of the gates.",
        "pemt export runs/cb cb-export --base_model google/flan-t5-base",
    )
    parser.add_argument("run_dir", metavar="RUN", help="output_dir of `pemt adapt`")
    parser.add_argument("folder", metavar="DIR", help="receives the files; new or empty")
    parser.add_argument(
        "--base_model",
        metavar="HUB_ID",
        help="what the adapter names as its base model; default: as the run was given it",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the tensors; float32 (default) answers exactly as the run, the others are half the size",
    )
    parser.add_argument(
        "--license",
        dest="licence",
        metavar="ID",
        help="the base model's, as the hub spells it; default: what its own model card says",
    )
    return parser


def push_parser() -> Parser:
    """The command line of `pemt push`."""
    parser = command_parser(
        "push",
        "Push what `pemt export` wrote to the Hugging Face hub, as one commit.",
        "pemt push cb-export me/flan-t5-base-cb",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("repo", metavar="OWNER/NAME", help="made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if it is made now")
    parser.add_argument("--message", default="pemt export", help="of the commit")
    return parser


def pull_parser() -> Parser:
    """The command line of `pemt pull`."""
    parser = command_parser(
        "pull",
        "Fetch what was pushed into a folder.",
        "pemt pull me/flan-t5-base-cb cb-adapter",
    )
    parser.add_argument("repo", metavar="OWNER/NAME")
    parser.add_argument("folder", metavar="DIR", help="new or empty")
    parser.add_argument("--revision", help="branch, tag or commit")
    return parser
