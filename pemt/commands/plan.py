"""`pemt plan`: memory, traffic and time of a run, before it is paid for."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.commands import plan_batch, plan_sweep
from pemt.commands.plan_sweep import EXPERTS, TOKENS_A_WORD, check_numbers
from pemt.config import AdapterConfig, ConfigError, ExpertConfig, Parser, RunConfig, command_parser
from pemt.model import projections_of, target_sites
from pemt.plan import (
    CHIPS,
    KNOWN,
    MOST_EXPERTS,
    Cluster,
    Division,
    Job,
    PlanError,
    describe,
    divide,
    figures,
    read_shape,
    read_zero,
)


def run(arguments: list[str]) -> None:
    """`pemt plan`, `pemt plan batch` and `pemt plan --sweep`."""
    if arguments[:1] == ["batch"]:
        plan_batch.run(arguments[1:])
        return
    if any(argument.split("=")[0] == "--sweep" for argument in arguments):
        plan_sweep.run(arguments)
        return
    options = make_parser().parse_args(arguments)
    check_numbers(options)
    cluster = _cluster(options)
    division = _division(options, cluster)
    cluster = replace(cluster, gpus_per_node=division.ranks_per_node)
    job = _job(options, division)
    zero = read_zero(options.ds_config)
    found = figures(job, zero, cluster, options.ds_config.parent)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{options.model_name_or_path}, {job.method}, {zero.name}: {cluster.nodes} x "
        f"{cluster.gpus_per_node} {options.gpu}, {job.batch} x ({job.encoder_tokens} -> {job.target}) "
        f"tokens a GPU, {_experts(job)}, {options.precision}\n"
        f"global batch: {division}{_beside_recipe(options, division)}\n"
    )
    print(describe(found, job, zero, cluster))


def make_parser() -> Parser:
    """The command line of `pemt plan`."""
    parser = command_parser(
        "plan",
        "Memory, bytes on the wire, time and the right DeepSpeed JSON of a run, before it is paid for.\n"
        "Nothing is loaded or downloaded for the published T5s; no GPU is needed. Sizes and traffic are\n"
        "counted as DeepSpeed does it, from the run and the JSON; times are a model of FLOPs over the\n"
        "chip's rate and bytes over the slowest link. The lines below the table say which is which.\n"
        "Efficiency at N nodes is a GPU's throughput there beside that of a single GPU.",
        "pemt plan --model_name_or_path google/flan-t5-xl --task_name superglue-cb \\",
        "      --num_nodes 4 --gpus_per_node 8 --gpu h100-80 --ds_config ds_configs/zero3.json",
        "pemt plan --model_name_or_path ./my-t5 --bank_dir bank --gpu a100-40 --json",
        "pemt plan batch --help          # the same division for a script: ranks, micro-batch, accumulation",
        "pemt plan --sweep paper_full    # GPU hours and disk of a sweep on 1 x H100 and 8 x A100",
    )
    _training_options(parser)
    machines = parser.add_argument_group("the machines")
    machines.add_argument("--num_nodes", type=int, default=1, metavar="N")
    machines.add_argument("--gpus_per_node", type=int, default=8, metavar="N")
    machines.add_argument("--gpu", choices=list(CHIPS), default="h100-80")
    machines.add_argument("--ds_config", type=Path, default="ds_configs/zero2.json", metavar="JSON")
    for name, unit, default, about in (
        ("gpu_memory_gb", "GB", None, "default: the data sheet's"),
        ("gpu_tflops", "T", None, "dense bf16; default: the data sheet's"),
        ("link_gb_s", "GB/S", None, "between GPUs of a node, one way"),
        ("network_gbit_s", "GBIT/S", 200.0, "of a node (200)"),
        ("latency_us", "US", 10.0, "between nodes (10)"),
        ("efficiency", "X", 0.4, "share of those TFLOP/s that is reached (0.4)"),
    ):
        machines.add_argument(f"--{name}", type=float, metavar=unit, default=default, help=about)
    parser.add_argument("--json", action="store_true", help="all figures as one JSON object")
    return parser


def _training_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("the training, as for `pemt adapt` and `pemt source`")
    training.add_argument(
        "--model_name_or_path",
        required=True,
        metavar="T5",
        help=f"known without a network: {', '.join(KNOWN)}; or a folder or hub id with config.json",
    )
    training.add_argument(
        "--task_name", "--task", metavar="TASK", help="gives target and prompt length"
    )
    training.add_argument(
        "--method", choices=["pemt", "adapter", "full", "source"], default="pemt",
        help="`source` is stage 1",
    )  # fmt: skip
    training.add_argument(
        "--bank_dir", metavar="DIR", help="the experts to mix; else as the next three say"
    )
    training.add_argument(
        "--expert_target_modules", nargs="+", default=["wo"], metavar="NAME",
        help="the layers that an expert is on: q k v o wi wi_0 wi_1 wo (wo)",
    )  # fmt: skip
    rank, reduction = ExpertConfig.rank, AdapterConfig.reduction_factor
    length = RunConfig.max_source_length
    batch = "examples of a step on all ranks; default: the recipe's, unless the next one is given"
    for name, letter, default, about in (
        ("num_experts", "K", EXPERTS, f"({EXPERTS})"),
        ("expert_rank", "R", rank, f"({rank})"),
        ("prompt_tokens", "N", None, "default: guessed from the description"),
        ("adapter_reduction_factor", "N", reduction, f"({reduction})"),
        ("global_batch_size", "N", None, batch),
        ("per_device_train_batch_size", "N", None, "default: what keeps the global batch"),
        ("gradient_accumulation_steps", "N", None, "default: what keeps the global batch, or 1"),
        ("max_source_length", "N", length, f"({length})"),
        ("max_target_length", "N", None, "default: the task's own, or 16"),
    ):
        training.add_argument(f"--{name}", type=int, metavar=letter, default=default, help=about)
    training.add_argument(
        "--gate", choices=["learned", "uniform"], default="learned", help="(learned)"
    )
    training.add_argument(
        "--precision",
        choices=["bf16", "fp16", "fp32"],
        default="bf16",
        help="(bf16, a run's default on every GPU that --gpu names)",
    )
    training.add_argument("--gradient_checkpointing", action="store_true")


def _division(options: argparse.Namespace, cluster: Cluster) -> Division:
    """The recipe's global batch over all GPUs, unless another one or a rank's share was typed."""
    micro, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    recipe = _recipe_batch(options)
    total = options.global_batch_size or recipe
    if micro is not None and options.global_batch_size is None:
        total = cluster.world_size * micro * (accumulation or 1)
    return divide(
        total,
        nodes=cluster.nodes,
        ranks_per_node=cluster.gpus_per_node,
        most=recipe,
        micro_batch=micro,
        accumulation=accumulation,
        all_ranks=not (micro is None and accumulation is None),
    )


def _recipe_batch(options: argparse.Namespace) -> int:
    return plan_batch.recipe_batch("source" if options.method == "source" else "adapt")


def _beside_recipe(options: argparse.Namespace, division: Division) -> str:
    """Notes on the global batch: that it is not the recipe's, or that it leaves GPUs idle."""
    recipe = _recipe_batch(options)
    if division.global_batch != recipe:
        return f"; the recipe's is {recipe}"
    unused = plan_batch.unused_ranks(division, options.gpus_per_node)
    return f", the recipe's{f'; {unused}' if unused else ''}"


def _job(options: argparse.Namespace, division: Division) -> Job:
    words, target = 15, 16
    if options.task_name:
        from pemt.tasks import get_task

        task = get_task(options.task_name)
        words, target = len(task.description.split()), task.max_target_length or target
    prompt = options.prompt_tokens or math.ceil(TOKENS_A_WORD * words)
    shape = read_shape(options.model_name_or_path)
    experts = 1 if options.method == "source" else options.num_experts
    sites = target_sites(options.expert_target_modules, shape.base_shape)
    job = Job(
        shape=shape,
        method=options.method,
        ranks=(options.expert_rank,) * experts,
        ranks_by_site=({site.name: options.expert_rank for site in sites},) * experts,
        learned_gates=options.gate == "learned",
        prompt_tokens=prompt,
        source_prompt_tokens=prompt * options.num_experts,
        adapter_reduction=options.adapter_reduction_factor,
        batch=division.micro_batch,
        source=options.max_source_length,
        target=options.max_target_length or target,
        accumulation=division.accumulation,
        bytes_per_value=4 if options.precision == "fp32" else 2,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    narrowest = min(shape.of(stack).d_model for stack in ("encoder", "decoder"))
    if options.adapter_reduction_factor > narrowest:
        raise ConfigError(
            f"--adapter_reduction_factor: found {options.adapter_reduction_factor}, allowed is at most "
            f"this base model's d_model, {narrowest}"
        )
    job = replace(job, **_bank(options.bank_dir)) if options.bank_dir else job
    most = max(len(job.mixed_at(site)) for site in shape.sites)
    if most > MOST_EXPERTS:
        raise PlanError(
            f"{'--bank_dir' if options.bank_dir else '--num_experts'}: found {most} experts on a layer, allowed are at "
            f"most {MOST_EXPERTS}; a run over more of them sets mixture.top_sources, plan that many with --num_experts"
        )
    return job


def _bank(bank_dir: str) -> dict[str, Any]:
    """Ranks, sites and prompt lengths of a bank's entries."""
    from pemt.bank import PROMPT, entry_folder, entry_names, read_shapes, site_names

    ranks, places, prompts = [], [], 0
    for task in entry_names(bank_dir):
        manifest, shapes = read_shapes(entry_folder(bank_dir, task))
        if manifest.kind != "lora":
            raise PlanError(
                f"{bank_dir}: the expert `{task}` is a {manifest.kind}; "
                "only LoRA experts can be planned with"
            )
        ranks.append(manifest.rank)
        places.append({site: shapes[f"{site}.down"][0] for site in site_names(shapes)})
        prompts += shapes[PROMPT][0]
    return {"ranks": tuple(ranks), "ranks_by_site": tuple(places), "source_prompt_tokens": prompts}


def _cluster(options: argparse.Namespace) -> Cluster:
    chip = CHIPS[options.gpu]
    given = {
        "memory": options.gpu_memory_gb and 1e9 * options.gpu_memory_gb,
        "flops": options.gpu_tflops and 1e12 * options.gpu_tflops,
        "link": options.link_gb_s and 1e9 * options.link_gb_s,
    }
    return Cluster(
        nodes=options.num_nodes,
        gpus_per_node=options.gpus_per_node,
        chip=replace(chip, **{key: value for key, value in given.items() if value}),
        network=options.network_gbit_s * 1e9 / 8,
        latency=options.latency_us * 1e-6,
        efficiency=options.efficiency,
    )


def _experts(job: Job) -> str:
    if job.method != "source" and not job.experts:
        return "no experts"
    layers = projections_of([name for each in job.ranks_by_site for name in each])
    many = "one LoRA expert" if job.method == "source" else f"{job.experts} LoRA experts"
    return f"{many} on {layers}, of rank {', '.join(map(str, sorted(set(job.ranks))))}"
