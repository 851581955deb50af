"""`pemt plan batch`: how a run's global batch is kept on a cluster's ranks; the launchers ask it."""

from __future__ import annotations

import sys
from pathlib import Path

from pemt.commands.fields import STAGES
from pemt.config import (
    Parser,
    RunConfig,
    command_parser,
    count,
    parse_config,
    read_recipe,
    value_sources,
)
from pemt.plan import Division, divide

MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def run(arguments: list[str]) -> None:
    """Three numbers on stdout, for scripts: ranks a node, micro-batch, accumulation; on stderr what they make."""
    options, fields = make_parser().parse_known_args(arguments)
    kind = STAGES[options.stage]
    config = parse_config(kind, fields, prog=f"pemt {options.stage}")
    typed = {key for key, source in value_sources(kind, fields).items() if source == "command line"}
    recipe = parse_config(kind, without(fields, MICRO, ACCUMULATION), prog=f"pemt {options.stage}")
    total = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    found = divide(
        options.global_batch_size or total,
        nodes=options.num_nodes,
        ranks_per_node=options.ranks_per_node,
        most=recipe.per_device_train_batch_size,
        micro_batch=config.per_device_train_batch_size
        if MICRO in typed
        else begun_micro_batch(config),
        accumulation=config.gradient_accumulation_steps if ACCUMULATION in typed else None,
        all_ranks=bool(typed & {MICRO, ACCUMULATION}),
    )
    print(found.ranks_per_node, found.micro_batch, found.accumulation, flush=True)
    if options.global_batch_size:
        whose = "as --global_batch_size says"
    elif value_sources(kind, without(fields, MICRO))[MICRO] == "default":
        whose = "the default"
    else:
        whose = "the recipe's"
    print(f"pemt: global batch {found.global_batch}, {whose}: {found}", file=sys.stderr, flush=True)
    if unused := unused_ranks(found, options.ranks_per_node):
        print(f"pemt: {unused}", file=sys.stderr, flush=True)


def make_parser() -> Parser:
    """The command line of `pemt plan batch`."""
    parser = command_parser(
        "plan batch",
        "Keep a recipe's global batch on a cluster: prints ranks a node, micro-batch and accumulation.\n"
        "The global batch is per_device_train_batch_size x gradient_accumulation_steps of the files behind\n"
        "--config, which are for one rank. Ranks take smaller micro-batches; where there are more ranks than\n"
        "examples fewer of them are used, which is logged; what is typed stays, or is refused with the numbers.",
        "pemt plan batch adapt --num_nodes 4 --ranks_per_node 8 --config adapt \\",
        "      --task_name superglue-cb --output_dir runs/cb --bank_dir bank",
    )
    parser.add_argument("stage", choices=list(STAGES), help="the command that is to run")
    parser.add_argument("--num_nodes", type=count, default=1, metavar="N")
    parser.add_argument(
        "--ranks_per_node", type=count, default=8, metavar="N", help="one a GPU (8)"
    )
    parser.add_argument(
        "--global_batch_size", type=count, metavar="N", help="default: the recipe's"
    )
    return parser


def unused_ranks(found: Division, ranks_per_node: int) -> str | None:
    """A line on GPUs that a division leaves idle; None where there are none."""
    if found.ranks_per_node == ranks_per_node:
        return None
    return (
        f"{found.ranks_per_node} of {ranks_per_node} ranks a node are used: a global batch of {found.global_batch} "
        "does not divide over all of them; take fewer nodes or GPUs, or a larger global batch"
    )


def recipe_batch(stage: str) -> int:
    """The published global batch of a stage, as its recipe has it for one rank."""
    recipe = read_recipe(stage)
    return int(recipe[MICRO]) * int(recipe.get(ACCUMULATION, 1))


def begun_micro_batch(config: RunConfig) -> int | None:
    """The micro-batch of the run that output_dir holds, if it is to be resumed: it cannot resume with another."""
    if config.overwrite_output_dir or config.resume_from_checkpoint is False:
        return None
    from pemt.checkpoint import saved_config

    found = (saved_config(Path(config.output_dir)) or {}).get(MICRO)
    return found if isinstance(found, int) and found > 0 else None


def without(arguments: list[str], *fields: str) -> list[str]:
    """A command line without some of its fields, written as `--field value` or `--field=value`."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in [f"--{field}" for field in fields]:
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept
