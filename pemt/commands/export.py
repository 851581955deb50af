"""`pemt export`: a finished run as a folder for others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pemt.config import Parser, command_parser


def run(arguments: list[str]) -> None:
    """`pemt export`."""
    options = vars(make_parser().parse_args(arguments))
    from pemt.run import check_finished

    check_finished(options["run_dir"])
    from pemt.publish import CONFIG, export_run  # with all the libraries

    folder = export_run(**options)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{folder}: {size / 2**20:.1f} MiB; read its README.md, then `pemt push {folder} OWNER/NAME`"
    )
    path = folder / CONFIG
    if path.exists():  # of a full model there is none
        base = json.loads(path.read_text())["base_model_name_or_path"]
        warn_of_local_base("the base model is", base)


def warn_of_local_base(what: str, base: str) -> None:
    """Tell, on stderr, where others are sent to a folder of this machine for the base model."""
    if base and Path(base).is_dir():
        print(
            f"pemt: {what} {base}, a folder of this machine; others need its name on the hub: --base_model",
            file=sys.stderr,
        )


def make_parser() -> Parser:
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
        choices=("float32", "bfloat16", "float16"),
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
