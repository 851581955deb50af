"""The plan as numbers, and as the table that a person reads."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pemt.plan.advice import advise, fits, largest_batch, scaling
from pemt.plan.count import sizes, weights
from pemt.plan.job import Cluster, Job, Zero
from pemt.plan.memory import Memory, memory
from pemt.plan.speed import flops, step_time
from pemt.plan.traffic import at_start, per_step

HELD = ("weights", "experts", "gradients", "optimizer", "activations", "buffers")


def figures(job: Job, zero: Zero, cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Everything the table says, as `pemt plan --json` prints it: bytes, seconds, FLOPs.

    Args:
        folder: holds the JSONs to choose among.
    """
    needed = memory(job, zero, cluster)
    count = sizes(weights(job))
    seconds = step_time(job, zero, cluster)
    samples = cluster.world_size * job.batch * job.accumulation
    steps = per_step(job, zero, cluster)
    return {
        "parameters": {**count, "total": sum(count.values())},
        "bytes_per_gpu": {
            **{each.name: getattr(needed, each.name) for each in fields(Memory)},
            "total": needed.total,
            "available": cluster.chip.memory - cluster.reserved,
        },
        "fits": fits(job, zero, cluster),
        "largest_micro_batch": largest_batch(job, zero, cluster),
        "wire_per_step": [{**asdict(each), "sent": each.sent(cluster.backend)} for each in steps],
        "sent_per_step": sum(each.sent(cluster.backend) for each in steps),
        "sent_at_start": sum(each.sent(cluster.backend) for each in at_start(job, zero, cluster)),
        "flops_per_step": flops(job) * cluster.world_size,
        "step_seconds": {**asdict(seconds), "total": seconds.total},
        "global_batch_size": samples,
        "samples_per_hour": 3600 * samples / seconds.total,
        "nodes": scaling(job, zero, cluster),
        "checkpoint_bytes": 12 * count["trained"],
        "advice": advise(job, cluster, folder, zero),
    }


def describe(found: dict[str, Any], job: Job, zero: Zero, cluster: Cluster) -> str:
    """The table."""
    parts = [_parameters(found), _memory(found), _wire(found, cluster), _time(found, cluster)]
    advice = f"take {found['advice']['name']}: {found['advice']['why']}"
    return "\n\n".join([*parts, advice, _honesty(job, zero, cluster)])


def _parameters(found: dict[str, Any]) -> str:
    count = found["parameters"]
    lines = [
        _row("parameters", f"{count['total']:,}"),
        _row("  frozen", f"{count['frozen']:,}"),
        _row("  experts", f"{count['expert']:,}"),
        _row("  trained", f"{count['trained']:,}", f"{count['trained'] / count['total']:.2%}"),
        _row("a checkpoint", _bytes(found["checkpoint_bytes"]), "12 bytes a trained parameter"),
    ]
    return "\n".join(lines)


def _memory(found: dict[str, Any]) -> str:
    held = found["bytes_per_gpu"]
    lines = ["memory of a GPU at the peak of a step"]
    words = {"optimizer": "fp32 masters and moments"}
    lines += [_row(f"  {words.get(key, key)}", _bytes(held[key])) for key in HELD]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines.append(
        _row("  together", _bytes(held["total"]), f"{verdict} into {_bytes(held['available'])}")
    )
    if held["host"]:
        lines.append(_row("  in CPU memory, a rank", _bytes(held["host"])))
    lines.append(_row("  largest micro-batch", f"{found['largest_micro_batch']:,}", "examples"))
    return "\n".join(lines)


def _wire(found: dict[str, Any], cluster: Cluster) -> str:
    lines = ["sent by each rank in a step, and as much out of each node"]
    lines += [
        _row(f"  {each['kind']}: {each['what']}", _bytes(each["sent"]), _over(each, cluster))
        for each in found["wire_per_step"]
        if each["sent"]
    ]
    lines.append(_row("  together", _bytes(found["sent_per_step"])))
    lines.append(_row("  once, at the start", _bytes(found["sent_at_start"])))
    return "\n".join(lines)


def _over(each: dict[str, Any], cluster: Cluster) -> str:
    inside = cluster.nodes > 1 and each["ranks"] <= cluster.gpus_per_node
    among = " of one node, not out of it" if inside else ""
    return f"to share {_bytes(each['size'])} over {each['ranks']} ranks{among}"


def _time(found: dict[str, Any], cluster: Cluster) -> str:
    seconds = found["step_seconds"]
    split = (
        f"passes {seconds['compute']:.3f}, transfers not hidden {seconds['exposed']:.3f}, "
        f"optimizer {seconds['optimizer']:.3f}"
    )
    lines = [
        "time (a model, not a measurement)",
        _row("  FLOPs of a step", f"{found['flops_per_step'] / 1e12:,.1f} T", "all ranks"),
        _row("  a step", f"{seconds['total']:.3f} s", split),
        _row(
            "  samples of a step", f"{found['global_batch_size']:,}", "ranks × batch × accumulation"
        ),
        _row("  samples an hour", f"{found['samples_per_hour']:,.0f}"),
    ]
    for nodes, at_nodes in found["nodes"].items():
        here = "  <- this job" if nodes == cluster.nodes else ""
        samples = found["global_batch_size"] // cluster.nodes * nodes
        each = f"{at_nodes['efficiency']:.0%} of a GPU alone, {samples:,} samples a step{here}"
        name = f"  {nodes} node{'s' if nodes > 1 else ''} of {cluster.gpus_per_node}"
        lines.append(_row(name, f"{at_nodes['step_seconds']:.3f} s", each))
    return "\n".join(lines)


def _honesty(job: Job, zero: Zero, cluster: Cluster) -> str:
    lines = [
        "Exact: parameters, gradients, masters and moments, checkpoint (DeepSpeed 0.19).",
        "By formula, held against real runs on CPUs by the tests: activations and the peak within 15 %,",
        "bytes on the wire within 10 % (from the third step on; headers of packets come on top).",
        f"A model: times. Assumed: {cluster.efficiency:.0%} of {cluster.chip.flops / 1e12:,.0f} TFLOP/s, "
        f"{8 * cluster.network / 1e9:,.0f} Gbit/s a node,",
        f"{cluster.chip.link / 1e9:,.0f} GB/s between GPUs; no data loading, evaluation, generation, stragglers.",
        f"{cluster.reserved / 1e9:.0f} GB of a GPU are left aside for libraries and fragments; prompts' lengths are",
        "guessed from the task's description where neither --prompt_tokens nor --bank_dir tells them.",
    ]
    if zero.quantized_weights:
        lines.append(
            "Quantised weights have not been run on a GPU yet: their figures are formulas alone."
        )
    if job.bytes_per_value == 4:
        lines.append("fp32 reaches less of a chip's bf16 rate: give its own with --gpu_tflops.")
    if job.method == "full":
        lines.append("Of full fine-tuning only the counts have been held against real runs.")
    return "\n".join(lines)


def _row(name: str, value: str, remark: str = "") -> str:
    return f"{name:<54} {value:>13}  {remark}".rstrip()


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:.0f} B"
