"""Which DeepSpeed JSON to take, the largest batch that fits, and how far a cluster's size pays."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from pathlib import Path

from pemt.plan.job import Cluster, Job, Zero, read_zero
from pemt.plan.memory import activations, memory
from pemt.plan.speed import step_time

NODES = (1, 2, 4, 8, 20)
MOST = 131_071  # examples of a micro-batch that are tried


def fits(job: Job, zero: Zero, cluster: Cluster) -> bool:
    """Whether a rank's memory is enough."""
    return memory(job, zero, cluster).total <= cluster.chip.memory - cluster.reserved


def largest_batch(job: Job, zero: Zero, cluster: Cluster) -> int:
    """The largest micro-batch that fits; 0 where not even one example does."""
    needed = memory(job, zero, cluster)
    room = cluster.chip.memory - cluster.reserved - (needed.total - needed.activations)
    batches = range(1, MOST + 1)
    return bisect_right(
        batches, room, key=lambda batch: activations(replace(job, batch=batch), cluster)
    )


def scaling(job: Job, zero: Zero, cluster: Cluster) -> dict[int, dict[str, float]]:
    """Nodes -> seconds of a step, and the share of one GPU's throughput that each keeps."""
    alone = step_time(job, zero, replace(cluster, nodes=1, gpus_per_node=1)).total
    by_nodes = {}
    for nodes in sorted({*NODES, cluster.nodes}):
        seconds = step_time(job, zero, replace(cluster, nodes=nodes)).total
        by_nodes[nodes] = {"step_seconds": seconds, "efficiency": min(1.0, alone / seconds)}
    return by_nodes


def advise(job: Job, cluster: Cluster, folder: Path, given: Zero) -> dict[str, str]:
    """The JSON of `ds_configs` that fits and is quickest, and why; among equals zero2, the default, goes first.

    Args:
        folder: where the JSONs lie.
        given: the one asked about, a candidate too.

    Returns:
        `name` and `why`.
    """
    candidates = _candidates(folder, given)
    fitting = [zero for zero in candidates if fits(job, zero, cluster)]
    if not fitting:
        batches = {zero.name: largest_batch(job, zero, cluster) for zero in candidates}
        name = max(batches, key=batches.__getitem__)
        if batches[name]:
            why = f"nothing fits this batch; here {batches[name]} examples a GPU would"
            return {"name": name, "why": why}
        return {"name": "none", "why": "not one example fits; take more GPUs or larger ones"}
    seconds = [step_time(job, zero, cluster).total for zero in fitting]
    quickest = min(seconds)
    time, best = next(
        pair for pair in zip(seconds, fitting, strict=True) if pair[0] <= 1.02 * quickest
    )
    needed = memory(job, best, cluster).total
    margin = "quicker" if time == quickest else "more than 2 % quicker"
    why = f"it fits ({needed / 1e9:.1f} GB a GPU), and nothing that fits is {margin}"
    passed = [zero.name for zero in candidates if zero not in fitting]
    return {"name": best.name, "why": why + (f"; too large: {', '.join(passed)}" if passed else "")}


def _candidates(folder: Path, given: Zero) -> list[Zero]:
    """The JSONs there are, the simplest first; zero3_quantized, not run yet, only where it was asked about."""
    order = ("zero2", "zero1", "zero0", "zero3", "zero2_offload", "zero3_offload")
    paths = [folder / f"{name}.json" for name in order]
    found = [read_zero(path) for path in paths if path.is_file()]
    return found if any(zero.name == given.name for zero in found) else [*found, given]
