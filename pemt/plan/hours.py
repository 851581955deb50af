"""GPU hours and disk of many runs, one after another: the step's formula times steps. A model, not a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from pemt.plan.advice import fits
from pemt.plan.batch import divide
from pemt.plan.count import sizes, weights
from pemt.plan.job import Cluster, Job, Zero
from pemt.plan.shapes import Shape
from pemt.plan.speed import step_time

CHECKPOINT = 12  # bytes a trained parameter: fp32 weight and two moments


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Args:
        group: what it is counted with, such as its method.
        job: its training; `batch` is the recipe's global batch, on whatever number of ranks.
        steps: optimizer steps.
        evaluated: examples that all its validations and its test generate answers for.
        eval_batch: how many of them a rank takes at once.
        checkpoints: how many are on the disk at its end.
    """

    group: str
    job: Job
    steps: int
    evaluated: int
    eval_batch: int
    checkpoints: int


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Of one group of runs.

    Args:
        training, evaluation: hours that the whole cluster is taken.
        shortest: those of the training in which a step would be shorter than the least that one takes.
        disk: bytes of their checkpoints.
        all_fit: whether every step fits into the GPUs' memory.
    """

    runs: int
    training: float
    shortest: float
    evaluation: float
    disk: int
    all_fit: bool

    @property
    def total(self) -> float:
        """Hours by the clock."""
        return self.training + self.evaluation


def hours_of(
    runs: Iterable[PlannedRun], zero: Zero, cluster: Cluster, *, least: float
) -> dict[str, Hours]:
    """Of every group of runs, in the order of the first of each.

    A batch that is evaluated is taken to cost as much as one of that size that is trained on: instead of the
    backward pass there is one of the decoder a token.

    Args:
        least: seconds that a step takes at least: starting its kernels, whatever the GPU's rate.
    """
    groups: dict[str, list[Hours]] = {}
    known: dict[str, _Step] = {}  # most runs differ in their data alone
    for run in runs:
        key = repr((run.job, run.eval_batch))
        step = known[key] = known.get(key) or _step(run, zero, cluster)
        shortest = least * step.accumulation
        training = run.steps * max(shortest, step.training) / 3600
        passes = math.ceil(run.evaluated / (run.eval_batch * step.ranks))
        found = Hours(
            runs=1,
            training=training,
            shortest=training if step.training < shortest else 0.0,
            evaluation=passes * max(least, step.evaluation) / 3600,
            disk=run.checkpoints * step.checkpoint,
            all_fit=step.fits,
        )
        groups.setdefault(run.group, []).append(found)
    return {group: added(each) for group, each in groups.items()}


def added(parts: list[Hours]) -> Hours:
    """Together."""
    return Hours(
        runs=sum(each.runs for each in parts),
        training=sum(each.training for each in parts),
        shortest=sum(each.shortest for each in parts),
        evaluation=sum(each.evaluation for each in parts),
        disk=sum(each.disk for each in parts),
        all_fit=all(each.all_fit for each in parts),
    )


class _Step(NamedTuple):
    """Of a job: seconds of a step and of an evaluated batch by formula, and what does not depend on them."""

    ranks: int
    accumulation: int
    training: float
    evaluation: float
    checkpoint: int
    fits: bool


def _step(run: PlannedRun, zero: Zero, cluster: Cluster) -> _Step:
    # fewer GPUs where the global batch does not divide
    batch, nodes, gpus = run.job.batch, cluster.nodes, cluster.gpus_per_node
    division = divide(batch, nodes=nodes, ranks_per_node=gpus, most=batch)
    used = replace(cluster, gpus_per_node=division.ranks_per_node)
    job = replace(run.job, batch=division.micro_batch, accumulation=division.accumulation)
    return _Step(
        ranks=used.world_size,
        accumulation=division.accumulation,
        training=step_time(job, zero, used).total,
        evaluation=step_time(replace(job, batch=run.eval_batch, accumulation=1), zero, used).total,
        checkpoint=CHECKPOINT * sizes(weights(job))["trained"],
        fits=fits(job, zero, used),
    )


def fp32_bytes(shape: Shape) -> int:
    """Of a base model's files."""
    return 4 * sizes(weights(Job(shape=shape, method="full")))["trained"]
