"""`pemt fetch`: what a run reads, for nodes without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pemt.commands.fields import STAGES
from pemt.config import AdaptConfig, ConfigError, Parser, RunConfig, command_parser, parse_config
from pemt.engine import importing_libraries

# What says where the libraries look, besides HF_HOME.
PLACES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")


def run(arguments: list[str]) -> None:
    """`pemt fetch`."""
    stage = "adapt"
    if arguments[:1] and arguments[0] in STAGES:
        stage, arguments = arguments[0], arguments[1:]
    options, fields = make_parser().parse_known_args(arguments)
    if not any(field.split("=")[0] == "--output_dir" for field in fields):
        fields += ["--output_dir", "runs"]  # which a run needs and this does not
    config = parse_config(STAGES[stage], fields, prog="pemt fetch")
    folder = None if options.to is None else _made(options.to)
    if folder is not None:  # before any library that reads it
        os.environ["HF_HOME"] = str(folder)
        for name in PLACES:
            os.environ.pop(name, None)
    lines = []
    for line in _bring_experts(config, peft=options.peft, bank=options.bank):
        print(line, flush=True)
        lines.append(line)
    with importing_libraries():
        from pemt.run import check_inputs
    check_inputs(config)
    with importing_libraries():
        from pemt.run import FETCHED, fetch_all
    for line in fetch_all(config):
        print(line, flush=True)
        lines.append(line)
    if folder is not None:
        with (folder / FETCHED).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def _bring_experts(config: RunConfig, *, peft: list[str] | None, bank: str | None) -> Iterator[str]:
    """Experts from the hub into the run's bank; a line on what came."""
    if not peft and not bank:
        return
    bank_dir = config.bank_dir if isinstance(config, AdaptConfig) else None
    if bank_dir is None:
        raise ConfigError(
            "--peft, --bank: they fill the bank that a target's run mixes; give --bank_dir, and no word `source`"
        )
    from pemt.bank import Adapter, add_peft, is_made_of
    from pemt.publish import pull_bank
    from pemt.storage import hub_is_asked

    if bank and hub_is_asked():  # else it is enough that what is here can be used
        yield f"{'pulled:':<11}{bank}: {pull_bank(bank, bank_dir).summary()}"
    missing = [each for each in map(Adapter, peft or ()) if not is_made_of(bank_dir, each)]
    if missing:
        add_peft(
            missing,
            bank_dir=bank_dir,
            model_name_or_path=config.model_name_or_path,
            tokenizer_name=config.tokenizer_name,
        )
        yield f"{'added:':<11}{', '.join(each.path_or_id for each in missing)}: {bank_dir}"


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
    """The command line of `pemt fetch`, less the run's fields."""
    parser = command_parser(
        "fetch",
        "Bring what a run reads here while there is a network: base model, tokenizer, data, experts; and say where\n"
        "each lies. Takes what `pemt adapt` takes, or behind the word `source` what `pemt source`\n"
        "takes. Nothing is trained. Offline it checks that all is there.",
        "pemt fetch --config adapt --task_name superglue-cb --bank_dir bank --to offline",
        "pemt fetch source --config source --task_name mnli --bank_dir bank",
        "pemt fetch --config adapt_hub --task_name superglue-cb --bank_dir bank --bank me/flan-t5-large-bank",
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="a folder for base, tokenizer and data, to be HF_HOME on nodes without a network; default: this "
        "machine's caches",
    )
    parser.add_argument(
        "--peft",
        nargs="+",
        metavar="HUB_ID",
        help="adapters that --bank_dir receives first, as by `pemt bank add`; those that it has are left alone",
    )
    parser.add_argument(
        "--bank",
        metavar="OWNER/NAME",
        help="a bank on the hub that --bank_dir receives first, as by `pemt bank pull`",
    )
    return parser
