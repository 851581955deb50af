"""The commands around the two stages. Each takes its command line and imports what it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pemt.arguments import parse_config
from pemt.config import AdaptConfig, PemtError, SourceConfig


def source(arguments: list[str]) -> None:
    """Stage 1."""
    config = parse_config(SourceConfig, arguments, prog="pemt source")
    from pemt.train import run_source

    run_source(config)


def adapt(arguments: list[str]) -> None:
    """Stage 2."""
    config = parse_config(AdaptConfig, arguments, prog="pemt adapt")
    from pemt.train import run_adapt

    run_adapt(config)


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


def tasks(arguments: list[str]) -> None:
    """`pemt tasks`: the task table."""
    argparse.ArgumentParser(prog="pemt tasks", description="List the tasks.").parse_args(arguments)
    from pemt.tasks import get_task, task_names

    for name in task_names():
        task = get_task(name)
        print(f"{name:<22} {', '.join(task.metrics):<18} {task.description}")


def ops(arguments: list[str]) -> None:
    """`pemt ops build` and `pemt ops info`."""
    parser = argparse.ArgumentParser(prog="pemt ops", description="The fused op.")
    parser.add_argument(
        "verb", choices=["build", "info"], help="compile it now; tell what would run and why"
    )
    verb = parser.parse_args(arguments).verb
    from pemt.ops import OpsError, build

    try:
        print("\n".join(build.build_all() if verb == "build" else build.describe()))
    except OpsError as error:
        raise PemtError(str(error)) from None


def bench(arguments: list[str]) -> None:
    """`pemt bench op`."""
    if arguments[:1] != ["op"]:
        raise PemtError(
            f"pemt bench: found {' '.join(arguments[:1]) or 'nothing'}, allowed is `op`"
        )
    from pemt.bench.op import main

    main(arguments[1:])


def demo(arguments: list[str]) -> None:
    """`pemt demo`."""
    from pemt.demo.run import main

    main(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "source": source,
    "adapt": adapt,
    "bank": bank,
    "tasks": tasks,
    "demo": demo,
    "ops": ops,
    "bench": bench,
}
