"""`pemt bank`: what is in a bank, and experts from and to elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from pemt.commands.bank_show import list_entries, show
from pemt.commands.export import warn_of_local_base
from pemt.config import Parser, PemtError, command_parser, verb_parser

OVERWRITE_THERE = "replace entries of the same name that differ; default: refuse to"
OVERWRITE = "replace the bank's entry of that name, with its scores; default: refuse to"


def run(arguments: list[str]) -> None:
    """`pemt bank VERB`."""
    options = vars(make_parser().parse_args(arguments))
    call, _, _ = _VERBS[options.pop("verb")]
    call(**options)


def make_parser() -> Parser:
    """The command line of `pemt bank`."""
    parser = command_parser(
        "bank",
        "The expert bank: what is in it, and experts from and to elsewhere.",
        "pemt bank list bank",
        "pemt bank add --help",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    parsers = {
        name: verb_parser(verbs, name, about, f"pemt bank {name} {example}")
        for name, (_, about, example) in _VERBS.items()
    }
    for name in ("list", "verify", "remove", "export"):
        parsers[name].add_argument("bank_dir")
    parsers["verify"].add_argument("tasks", nargs="*", metavar="task", help="default: all")
    parsers["remove"].add_argument("tasks", nargs="+", metavar="task")
    merging, exporting = parsers["merge"], parsers["export"]
    merging.add_argument("bank_dir", help="receives the entries; made if it does not exist")
    merging.add_argument("others", nargs="+", metavar="other")
    exporting.add_argument("--peft", required=True, metavar="FOLDER", help="receives the folders")
    exporting.add_argument("--tasks", nargs="+", metavar="TASK", help="default: every lora source")
    _add_showing(parsers["show"])
    _add_adding(parsers["add"])
    _add_importing(parsers["import-official"])
    _add_pushing(parsers["push"])
    _add_pulling(parsers["pull"])
    return parser


def _add_showing(showing: Parser) -> None:
    showing.add_argument("bank_dir", nargs="?", default=argparse.SUPPRESS)
    showing.add_argument("task", nargs="?", help="the entry")
    showing.add_argument("--bank_dir", metavar="DIR", help="the bank, where it is not named first")
    for name, about in (
        ("task_name", "rank the entries for this task, by the similarity of their prompts"),
        ("task_file", "YAML file with a task of your own: see docs/extending.md"),
        ("model_name_or_path", "with --task_name: the base model; default: as the entries say"),
        ("tokenizer_name", "default: the base model's own"),
    ):
        showing.add_argument(f"--{name}", help=about)


def _add_adding(adding: Parser) -> None:
    adding.add_argument("--peft", required=True, nargs="+", metavar="PATH_OR_HUB_ID")
    adding.add_argument("--bank_dir", required=True)
    adding.add_argument(
        "--task",
        nargs="+",
        help="name of the entry, one for each adapter; default: the last part of its path or hub id",
    )
    adding.add_argument(
        "--description",
        nargs="+",
        help="one sentence on the task, of which its prompt is made, one for each adapter; default: that of the task "
        "named so, or the words of the adapter's own name",
    )
    adding.add_argument(
        *("--model_name_or_path", "--base"), help="its base model; default: as the adapter says"
    )
    adding.add_argument("--tokenizer_name", help="default: the base model's own")
    adding.add_argument("--revision", help="branch, tag or commit on the hub")
    adding.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def _add_importing(importing: Parser) -> None:
    importing.add_argument("folder", help="folder of one source task")
    importing.add_argument("--bank_dir", required=True)
    importing.add_argument("--task", required=True, help="name of the entry")
    importing.add_argument(
        "--model_name_or_path", required=True, help="the base model it was trained on"
    )
    importing.add_argument("--description", help="the sentence its prompt started from")
    importing.add_argument(
        "--kind", choices=["lora", "bottleneck"], help="where both files lie there"
    )
    importing.add_argument("--alpha", type=float, default=64.0, help="LoRA's alpha; published: 64")
    importing.add_argument("--overwrite", action="store_true", help=OVERWRITE)


def _add_pushing(pushing: Parser) -> None:
    pushing.add_argument("repo_id", metavar="OWNER/NAME", help="made if it does not exist")
    pushing.add_argument("--bank_dir", required=True)
    pushing.add_argument("--private", action="store_true", help="if it is made now")
    pushing.add_argument("--message", default="pemt bank push", help="of the commit")
    pushing.add_argument("--overwrite", action="store_true", help=OVERWRITE_THERE)
    pushing.add_argument(
        "--base_model",
        metavar="HUB_ID",
        help="what the card names as the base model; default: as the entries do",
    )
    pushing.add_argument(
        "--license",
        dest="licence",
        metavar="ID",
        help="of entries that were made of no adapter of the hub, as the hub spells it; default: what the base "
        "model's own card says",
    )


def _add_pulling(pulling: Parser) -> None:
    pulling.add_argument("repo_id", metavar="OWNER/NAME")
    pulling.add_argument("--bank_dir", required=True, help="made if it does not exist")
    pulling.add_argument("--revision", help="branch, tag or commit")
    pulling.add_argument("--overwrite", action="store_true", help=OVERWRITE_THERE)


def _verify(*, bank_dir: str, tasks: list[str]) -> None:
    from pemt.bank import verify

    faults = verify(bank_dir, tasks or None)
    for task, fault in faults.items():
        print(f"{task}: {fault or 'intact'}")
    broken = [task for task, fault in faults.items() if fault]
    if broken:
        raise PemtError(
            f"{bank_dir}: {len(broken)} of {len(faults)} entries cannot be used: {', '.join(broken)}; "
            "write them again or take them out with `pemt bank remove`"
        )


def _remove(*, bank_dir: str, tasks: list[str]) -> None:
    from pemt.bank import remove

    print(f"removed {', '.join(remove(bank_dir, tasks))}")


def _merge(*, bank_dir: str, others: list[str]) -> None:
    from pemt.bank import merge

    print(f"{bank_dir}: added {', '.join(merge(bank_dir, others))}")


def _add(
    *, peft: list[str], task: list[str] | None, description: list[str] | None, **options: Any
) -> None:
    for name, values in (("task", task), ("description", description)):
        if values is not None and len(values) != len(peft):
            raise PemtError(
                f"--{name}: found {len(values)} for {len(peft)} adapters; give one for each, or none"
            )
    from pemt.bank import Adapter, add_peft
    from pemt.model import projections_of

    nothing = [None] * len(peft)
    adapters = map(Adapter, peft, task or nothing, description or nothing)
    for added in add_peft(list(adapters), **options):
        prompt = "its own" if added.prompt is None else f"made from `{added.prompt}`"
        lora = added.lora
        print(
            f"{added.folder}: lora on {projections_of(lora.sites)}, rank {lora.rank}, on {added.base_name}; "
            f"prompt: {prompt}"
        )
        if lora.absent:
            print(
                f"the adapter leaves {len(lora.absent)} of {len(lora.absent) + len(lora.sites)} such layers alone: "
                f"{', '.join(lora.absent)}"
            )


def _push(*, repo_id: str, bank_dir: str, **options: Any) -> None:
    from pemt.publish import push_bank

    pushed = push_bank(bank_dir, repo_id, **options)
    print(f"{repo_id}: {pushed.changes.summary()}")
    print(pushed.address or "nothing to push")
    warn_of_local_base("the card names the base model as", pushed.base_model)


def _pull(*, repo_id: str, bank_dir: str, **options: Any) -> None:
    from pemt.publish import pull_bank

    print(f"{bank_dir}: {pull_bank(repo_id, bank_dir, **options).summary()}")


def _export(*, bank_dir: str, peft: str, tasks: list[str] | None) -> None:
    from pemt.bank import export_peft

    for folder in export_peft(bank_dir, peft, tasks=tasks):
        print(folder)


def _import(*, bank_dir: str, task: str, model_name_or_path: str, **options: Any) -> None:
    from pemt.bank import import_official
    from pemt.model import base_shape, load_config

    base = {"name": model_name_or_path, **base_shape(load_config(model_name_or_path))}
    print(import_official(bank_dir=bank_dir, task=task, base=base, **options))


# Name: what it calls, what it does, an example's arguments.
_VERBS: dict[str, tuple[Callable[..., None], str, str]] = {
    "list": (list_entries, "one line per entry", "bank"),
    "show": (
        show,
        "all that is known of one entry, or which entries are most like a task",
        "bank mnli\n  pemt bank show bank --task_name rte",
    ),
    "verify": (_verify, "checksums, shapes and values of the entries", "bank"),
    "remove": (_remove, "take entries out", "bank mnli qnli"),
    "merge": (_merge, "copy other banks' entries into one", "bank mine theirs"),
    "add": (
        _add,
        "LoRA adapters in PEFT's format, on any linear layers, become experts",
        "--peft someone/flan-t5-base-mnli-lora --task mnli --bank_dir bank",
    ),
    "import-official": (
        _import,
        "what the published code saved: task_embedding.pt, and lora.pt or adapter.pt",
        "outputs/mnli --bank_dir bank --task mnli --model_name_or_path google-t5/t5-base",
    ),
    "push": (
        _push,
        "the whole bank to the Hugging Face hub, as one commit with a model card",
        "me/flan-t5-large-bank --bank_dir bank",
    ),
    "pull": (
        _pull,
        "every expert of a pushed bank into a bank here",
        "me/flan-t5-large-bank --bank_dir bank",
    ),
    "export": (
        _export,
        "write the lora sources as PEFT adapters, a folder each",
        "bank --peft adapters",
    ),
}
