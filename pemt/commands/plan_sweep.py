"""`pemt plan --sweep`: GPU hours and disk of a whole sweep, by formula."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

from pemt.config import (
    AdaptConfig,
    ConfigError,
    ExpertConfig,
    Parser,
    RunConfig,
    SourceConfig,
    command_parser,
    sweep_file,
)
from pemt.model import target_sites
from pemt.plan import (
    CHIPS,
    Cluster,
    Hours,
    Job,
    PlanError,
    PlannedRun,
    Zero,
    added,
    examples_of,
    fp32_bytes,
    hours_of,
    read_shape,
)

TOKENS_A_WORD = 1.3  # of English descriptions in T5's vocabulary, about
# What is planned for where the command line names no other machines.
MACHINES = ((1, "h100-80"), (8, "a100-80"))
PROMPT_TUNING = 100  # tokens, unless peft_config says otherwise
STAGE_1 = "stage 1"
EXPERTS = 6
ASSUMED = """\
Formulas; nothing is measured. Assumed: {efficiency:.0%} of the data sheet's dense bf16 FLOP/s,
since a base T5's products are small (--efficiency); no step takes less than {least_step_ms:.0f} ms, to start its
kernels (--least_step_ms); every example has max_source_length tokens (most of GLUE's have far fewer);
an evaluated batch is as dear as a trained one. Global batches stay the recipe's: GPUs share one, and
some idle where it does not divide. Left out: starts, loading, tokenising, saving, stragglers.
lora, bitfit, prompt and peft are counted as `adapter`, whose trainable state is larger.
Disk: checkpoints alone (the newest save_total_limit and the best). The base model ({base_gb:.1f} GB), the hub's
downloads and tokenised data come on top."""


def run(arguments: list[str]) -> None:
    """`pemt plan --sweep FILE`."""
    options = make_parser().parse_args(arguments)
    check_numbers(options)
    from pemt.sweep import read_sweep

    path = sweep_file(options.sweep)
    sweep = read_sweep(path)
    ranks = {source.task_name: source.expert.rank for source in sweep.sources}
    planned = [_planned(source, STAGE_1, ranks) for source in sweep.sources]
    planned += [_planned(each.config, each.method, ranks) for each in sweep.runs]
    zero, least = Zero(name="zero2.json", stage=2), options.least_step_ms / 1000
    found: list[dict[str, Any]] = []
    for gpus, gpu in MACHINES:
        cluster = Cluster(
            nodes=1, gpus_per_node=gpus, chip=CHIPS[gpu], efficiency=options.efficiency
        )
        groups = hours_of(planned, zero, cluster, least=least)
        found.append({"gpus": gpus, "gpu": gpu, "groups": groups})
    if options.json:
        print(json.dumps(found, indent=2, default=asdict))
        return
    base = sweep.runs[0].config.model_name_or_path
    print(f"{path}: {len(planned)} runs, one after another, of {base}\n")
    for each in found:
        print(_table(**each) + "\n")
    print(ASSUMED.format(**vars(options), base_gb=fp32_bytes(planned[0].job.shape) / 1e9))


def check_numbers(options: argparse.Namespace) -> None:
    """Raise `ConfigError` for a whole number below 1, and for any other number not above 0; a latency may be 0."""
    for name, value in vars(options).items():
        if type(value) is int and value < 1:
            raise ConfigError(f"--{name}: found {value}, at least 1 is needed")
        if type(value) is float and not 0 < value < math.inf and (name, value) != ("latency_us", 0):
            raise ConfigError(f"--{name}: found {value}, it must be above 0")


def make_parser() -> Parser:
    """The command line of `pemt plan --sweep`."""
    parser = command_parser(
        "plan",
        "GPU hours and disk of a sweep on 1 x H100 and on 8 x A100, before it is paid for: formulas, nothing\n"
        "is measured. Nothing is downloaded: the published data sets' sizes are in a table.",
        "pemt plan --sweep paper_full",
    )
    parser.add_argument(
        "--sweep", required=True, metavar="FILE", help="as for `pemt sweep --config`"
    )
    parser.add_argument(
        "--efficiency", type=float, default=0.2, metavar="X",
        help="share of the data sheet's dense bf16 FLOP/s that is reached (0.2)",
    )  # fmt: skip
    parser.add_argument(
        "--least_step_ms", type=float, default=60.0, metavar="MS",
        help="a step takes so long at least, however small: its kernels have to be started (60)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    return parser


def _planned(config: RunConfig, group: str, ranks: dict[str, int]) -> PlannedRun:
    """A run's steps and evaluations; `ranks` are those of the experts that the sweep trains."""
    from pemt.tasks import get_task

    task = get_task(config.task_name, config.task_file)
    sets = examples_of(task)
    if sets is None or config.data_dir or config.task_file:
        raise PlanError(
            f"task {config.task_name}: the number of its examples is not known; `pemt plan --sweep` knows the "
            "published data sets, from the hub"
        )
    train = sets.train
    if config.few_shot:
        train = config.few_shot * max(1, len(task.labels))
    train = min(train, config.max_train_samples or train)
    validation, test = (
        min(each, config.max_eval_samples or each) for each in (sets.validation, sets.test)
    )
    job = _job(config, len(task.description.split()), task.max_target_length or 16, ranks)
    an_epoch = math.ceil(train / job.batch)
    steps = config.max_steps if config.max_steps > 0 else config.num_train_epochs * an_epoch
    validations = math.ceil(steps / an_epoch) if config.eval_strategy == "epoch" else 0
    return PlannedRun(
        group=group,
        job=job,
        steps=steps,
        evaluated=validations * validation + test,
        eval_batch=config.per_device_eval_batch_size,
        checkpoints=min(config.save_total_limit + 1, max(1, validations)),
    )


def _job(config: RunConfig, words: int, target: int, ranks: dict[str, int]) -> Job:
    shape = read_shape(config.model_name_or_path)
    prompt = math.ceil(TOKENS_A_WORD * words)
    given: dict[str, Any] = {"method": "adapter"}
    if isinstance(config, SourceConfig):
        sites = target_sites(config.expert.target_modules, shape.base_shape)
        rank = config.expert.rank
        given = {
            "method": "source",
            "ranks": (rank,),
            "ranks_by_site": ({site.name: rank for site in sites},),
        }
    elif isinstance(config, AdaptConfig):
        given["adapter_reduction"] = config.adapter.reduction_factor
        given["train_layer_norms"] = config.mixture.train_layer_norms
        if config.method in ("pemt", "full"):
            given["method"] = config.method
        if config.method == "pemt":
            mixed = config.source_tasks or [STAGE_1] * EXPERTS
            given["ranks"] = tuple(ranks.get(name, ExpertConfig.rank) for name in mixed)
            given["source_prompt_tokens"] = prompt * len(mixed)
        elif config.method == "prompt":
            prompt = (config.peft_config or {}).get("num_virtual_tokens", PROMPT_TUNING)
    return Job(
        shape=shape,
        prompt_tokens=prompt,
        batch=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        source=config.max_source_length,
        target=config.max_target_length or target,
        gradient_checkpointing=config.gradient_checkpointing,
        **given,
    )


def _table(gpus: int, gpu: str, groups: dict[str, Hours]) -> str:
    head = f"{gpus} x {gpu}"
    lines = [
        f"{head:<20}{'runs':>6}{'training h':>12}{'evaluation h':>14}{'GPU hours':>11}{'disk GB':>9}"
    ]
    together = added(list(groups.values()))
    rows = {**groups, "together": together}
    lines += [_row(name, gpus, each) for name, each in rows.items()]
    shortest = together.shortest / together.training
    lines.append(
        f"{together.total:,.0f} hours by the clock; {shortest:.0%} of the training in steps of the least length"
    )
    return "\n".join(lines)


def _row(name: str, gpus: int, each: Hours) -> str:
    fits = "" if each.all_fit else "  DOES NOT FIT into a GPU's memory"
    return (
        f"{name:<20}{each.runs:>6}{each.training:>12,.1f}{each.evaluation:>14,.1f}"
        f"{gpus * each.total:>11,.1f}{each.disk / 1e9:>9,.1f}{fits}"
    )
