"""Which DeepSpeed JSON to take, the largest batch that fits, and how far a cluster's size pays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pemt.plan.job import Cluster, Job, Zero, read_zero
from pemt.plan.memory import activations, memory
from pemt.plan.speed import step_time

NODES = (1, 2, 4, 8, 20)
MOST = 65_536


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The JSON to take, and why."""

    name: str
    why: str


def fits(job: Job, zero: Zero, cluster: Cluster) -> bool:
    """Whether a rank's memory is enough."""
    return memory(job, zero, cluster).total <= cluster.chip.memory - cluster.reserved


def largest_batch(job: Job, zero: Zero, cluster: Cluster) -> int:
    """The largest micro-batch that fits; 0 where not even one example does."""
    needed = memory(job, zero, cluster)
    room = cluster.chip.memory - cluster.reserved - (needed.total - needed.activations)

    def has_room(batch: int) -> bool:
        return activations(replace(job, batch=batch), cluster) <= room

    fitting, too_large = 0, 1
    while too_large <= MOST and has_room(too_large):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if has_room(middle):
            fitting = middle
        else:
            too_large = middle
    return fitting


def scaling(job: Job, zero: Zero, cluster: Cluster) -> dict[int, tuple[float, float]]:
    """Nodes -> (seconds of a step, share of one GPU's throughput that each keeps)."""
    alone = step_time(job, zero, replace(cluster, nodes=1, gpus_per_node=1)).total
    by_nodes = {}
    for nodes in sorted({*NODES, cluster.nodes}):
        seconds = step_time(job, zero, replace(cluster, nodes=nodes)).total
        by_nodes[nodes] = (seconds, min(1.0, alone / seconds))
    return by_nodes


def advise(job: Job, cluster: Cluster, folder: Path, given: Zero) -> Advice:
    """The JSON of `ds_configs` that fits and is quickest; among equals zero2, the default, goes first.

    Args:
        folder: where the JSONs lie.
        given: the one asked about, a candidate too.
    """
    candidates = _candidates(folder, given)
    rated = [
        (step_time(job, zero, cluster).total, zero)
        for zero in candidates
        if fits(job, zero, cluster)
    ]
    if not rated:
        best = max(candidates, key=lambda zero: largest_batch(job, zero, cluster))
        batch = largest_batch(job, best, cluster)
        if batch:
            return Advice(
                name=best.name, why=f"nothing fits this batch; here {batch} examples a GPU would"
            )
        return Advice(name="none", why="not one example fits; take more GPUs or larger ones")
    quickest = min(seconds for seconds, _ in rated)
    seconds, best = next((seconds, zero) for seconds, zero in rated if seconds <= 1.02 * quickest)
    needed = memory(job, best, cluster).total
    why = f"it fits ({needed / 1e9:.1f} GB a GPU), "
    if seconds == quickest:
        why += "and nothing that fits is quicker"
    else:
        why += "and nothing that fits is more than 2 % quicker"
    passed = [zero.name for zero in candidates if not fits(job, zero, cluster)]
    return Advice(name=best.name, why=why + (f"; too large: {', '.join(passed)}" if passed else ""))


def _candidates(folder: Path, given: Zero) -> list[Zero]:
    """The JSONs there are, the simplest first; zero3_quantized, not run yet, only where it was asked about."""
    order = ("zero2", "zero1", "zero0", "zero3", "zero2_offload", "zero3_offload")
    paths = [folder / f"{name}.json" for name in order]
    found = [read_zero(path) for path in paths if path.is_file()]
    return found if any(zero.name == given.name for zero in found) else [*found, given]
