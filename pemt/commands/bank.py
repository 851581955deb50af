"""`pemt bank`: list a bank, import the published code's experts."""

from __future__ import annotations

import argparse


def bank(arguments: list[str]) -> None:
    """`pemt bank import-official` and `pemt bank list`."""
    parser = argparse.ArgumentParser(prog="pemt bank", description="The expert bank.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="one line per entry")
    listing.add_argument("bank_dir")
    importing = verbs.add_parser(
        "import-official",
        help="read what the published code saved: task_embedding.pt, and lora.pt or adapter.pt",
    )
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
    options = vars(parser.parse_args(arguments))
    if options.pop("verb") == "list":
        _bank_list(**options)
    else:
        _bank_import(**options)


def _bank_list(*, bank_dir: str) -> None:
    from pemt.bank import read_manifests

    for entry in read_manifests(bank_dir):
        print(f"{entry.task}: {entry.kind}, rank {entry.rank}, on {entry.base['name']}")


def _bank_import(
    *, folder: str, bank_dir: str, task: str, model_name_or_path: str, **options: object
) -> None:
    from pemt.bank import import_official
    from pemt.base import load_shape

    base = {"name": model_name_or_path, **load_shape(model_name_or_path)}
    print(import_official(folder, bank_dir=bank_dir, task=task, base=base, **options))  # type: ignore[arg-type]
