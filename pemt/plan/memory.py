"""What a rank holds at the peak of a step, by formula.

The sizes of gradients and optimizer states are DeepSpeed 0.19's to the byte. Activations are counted
in `activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from pemt.plan.activations import saved, transient
from pemt.plan.count import Weight, weights
from pemt.plan.gather import gathered, is_kept
from pemt.plan.job import Cluster, Job, Zero


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank; `host` lies in CPU memory, all else on the GPU.

    Args:
        weights: of base, prompt and adapters; experts: frozen ones from the bank.
        optimizer: fp32 masters and AdamW's moments.
        buffers: weights that stage 3 has gathered, buckets of gradients, the step's fp32 gradients.
        activations: kept for the backward pass, and the largest thing made on the way.
    """

    weights: float
    experts: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the GPU."""
        return sum(getattr(self, each.name) for each in fields(self) if each.name != "host")


def memory(job: Job, zero: Zero, cluster: Cluster) -> Memory:
    """A rank's memory at the peak of a step."""
    found, world = weights(job), cluster.world_size
    held = [(each, _held(each, zero, world, job)) for each in found]
    of_base = sum(size for each, size in held if each.role != "expert")
    of_experts = sum(size for each, size in held if each.role == "expert")
    # the experts' part of what is one parameter with a weight of the base
    shared = sum(size * each.experts / each.size for each, size in held)
    result = Memory(
        weights=of_base - shared,
        experts=of_experts + shared,
        gradients=gradient_bytes(found, zero, job, world),
        optimizer=optimizer_bytes(found, zero, job, world),
        buffers=_buffers(found, zero, job, cluster),
        activations=activations(job, cluster),
    )
    if zero.offload_optimizer:
        moved = result.host + result.optimizer + result.gradients
        result = replace(result, optimizer=0, gradients=0, host=moved)
    if zero.offload_param:
        moved = result.host + result.weights + result.experts
        result = replace(result, weights=0, experts=0, host=moved)
    return result


def activations(job: Job, cluster: Cluster) -> float:
    """Of a rank's memory all that depends on the batch, bytes."""
    return saved(job, "gpu" if cluster.backend == "nccl" else "cpu") + transient(job)


def optimizer_bytes(found: list[Weight], zero: Zero, job: Job, world: int) -> int:
    """Masters, moments and step counts of one rank."""
    trained = [each for each in found if each.role == "trained"]
    size = sum(each.size for each in trained)
    steps = 0 if zero.offload_optimizer else 4  # the CPU Adam counts in a plain number
    if zero.stage == 0:
        masters = 0 if job.bytes_per_value == 4 else 4 * size
        return masters + 8 * size + steps * len(trained)
    return 12 * _trained_share(trained, zero, world) + steps


def gradient_bytes(
    found: list[Weight], zero: Zero, job: Job, world: int, rank: int | None = None
) -> int:
    """Gradients between the backward pass and the step, of a rank or of the one with most.

    At stages 1 and 2 a rank keeps whole the gradients that its share cuts through.
    """
    trained = [each for each in found if each.role == "trained"]
    size = sum(each.size for each in trained)
    value = job.bytes_per_value
    if zero.stage == 0:
        return value * size
    if zero.stage == 3:
        return value * _trained_share(trained, zero, world)
    ranks = range(world) if rank is None else (rank,)
    most = max(_overlapping(trained, padded(size, world) // world, each) for each in ranks)
    accumulated = size if zero.stage == 1 and job.accumulation > 1 else 0
    return value * (most + accumulated)


def padded(size: int, world: int) -> int:
    """Elements of the flat trained weights at stages 1 and 2."""
    return math.ceil(size / (2 * world)) * 2 * world


def share(size: int, world: int) -> int:
    """Elements of one rank's part of a weight at stage 3."""
    return math.ceil(size / world)


def _trained_share(trained: list[Weight], zero: Zero, world: int) -> int:
    if zero.stage == 3:
        return sum(share(each.size, world) for each in trained)
    return padded(sum(each.size for each in trained), world) // world


def _overlapping(trained: list[Weight], part: int, rank: int) -> int:
    """Elements of the weights of which a rank's part holds something, and what fills it up."""
    begin, end = rank * part, (rank + 1) * part
    total = at = 0
    for each in trained:
        if at < end and at + each.size > begin:
            total += each.size
        at += each.size
    return total + max(0, end - max(at, begin))


def _held(weight: Weight, zero: Zero, world: int, job: Job) -> int:
    """Bytes of a weight while nothing is gathered."""
    value = job.bytes_per_value
    if zero.stage < 3 or world == 1:
        return value * weight.size
    mine = value * share(weight.size, world)
    if zero.secondary > 1:
        mine += value * share(weight.size, min(zero.secondary, world))
    if is_kept(weight.size, zero):
        mine += value * weight.size
    return mine


def _buffers(found: list[Weight], zero: Zero, job: Job, cluster: Cluster) -> float:
    world = cluster.world_size
    trained = [each for each in found if each.role == "trained"]
    size, value = sum(each.size for each in trained), job.bytes_per_value
    if zero.stage == 0:
        # one flat copy for the all-reduce; under half precision the step's fp32 gradients
        return max(value * size, 4 * size if value < 4 else 0)
    # On a CPU, memory that was never written to is none.
    bucket = zero.bucket if cluster.backend == "nccl" else min(zero.bucket, size)
    buckets = value * zero.buckets * bucket
    step = 0 if zero.offload_optimizer else 4 * _trained_share(trained, zero, world)
    taken = 0
    if zero.stage == 3 and world > 1:
        passes = gathered(found, zero)
        taken = value * (passes.live + passes.largest)
    # Gathered weights are given back before the step makes its fp32 gradients.
    return buckets + max(taken, step)
