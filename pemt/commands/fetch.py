"""`pemt fetch`: what a run reads, for nodes without a network."""

from __future__ import annotations

import os
from pathlib import Path

from pemt.commands.plan_batch import STAGES
from pemt.config import ConfigError, Parser, command_parser, parse_config
from pemt.engine import LIBRARIES, telling

# What says where the libraries look, besides HF_HOME.
PLACES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")


def run(arguments: list[str]) -> None:
    """`pemt fetch`."""
    stage = "adapt"
    if arguments[:1] and arguments[0] in STAGES:
        stage, arguments = arguments[0], arguments[1:]
    options, fields = _own_parser().parse_known_args(arguments)
    if not any(field.split("=")[0] == "--output_dir" for field in fields):
        fields += ["--output_dir", "runs"]  # which a run needs and this does not
    config = parse_config(STAGES[stage], fields, prog="pemt fetch")
    folder = None if options.to is None else _made(options.to)
    if folder is not None:  # before any library that reads it
        os.environ["HF_HOME"] = str(folder)
        for name in PLACES:
            os.environ.pop(name, None)
    from pemt.run import check_inputs

    check_inputs(config)
    with telling(LIBRARIES):
        from pemt.run import FETCHED, fetch_all
    lines = []
    for line in fetch_all(config):
        print(line, flush=True)
        lines.append(line)
    if folder is not None:
        with (folder / FETCHED).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def _made(name: str) -> Path:
    folder = Path(name).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--to: {folder} cannot be made: {error.strerror}; give a folder that can be written"
        ) from None
    return folder


def make_parser() -> Parser:
    """Its own options and the run's fields: what a shell can complete behind it."""
    from pemt.commands.fields import add_fields

    return add_fields(_own_parser())


def _own_parser() -> Parser:
    parser = command_parser(
        "fetch",
        "Bring what a run reads here while there is a network: base model, tokenizer, data; look at its experts;\n"
        "and say where each lies. Takes what `pemt adapt` takes, or behind the word `source` what `pemt source`\n"
        "takes. Nothing is trained. Offline it checks that all is there.",
        "pemt fetch --config adapt --task_name superglue-cb --bank_dir bank --to offline",
        "pemt fetch source --config source --task_name mnli --bank_dir bank",
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="a folder for it all, to be HF_HOME on nodes without a network; default: this machine's caches",
    )
    return parser
