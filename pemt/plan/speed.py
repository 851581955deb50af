"""FLOPs of a step by formula, and what time they and the traffic take: a model, not a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pemt.model import Site
from pemt.plan.count import sizes, weights
from pemt.plan.job import Cluster, Job, Zero
from pemt.plan.memory import memory
from pemt.plan.traffic import Collective, per_step

# Share of a step's passes behind which overlapping transfers can hide.
HIDDEN = 0.8
CPU_ADAM = 1.5e9  # elements a second that DeepSpeed's CPU Adam updates, about


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step.

    Args:
        compute: forward and backward passes.
        exposed: transfers that the passes do not hide.
        optimizer: reading and writing masters and moments.
    """

    compute: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.exposed + self.optimizer


def flops(job: Job) -> float:
    """Of one rank's step: matrix products alone, each multiply-add counted as two.

    A frozen matrix costs its product forward and one backward, a trained one two backward; with
    activation checkpointing the blocks' forward products are done twice.
    """
    frozen, trained, scores = _forward(job)
    once = frozen + trained + scores
    back = frozen + 2 * trained + 2 * scores
    again = once if job.gradient_checkpointing else 0.0
    decoder = job.shape.of("decoder")
    head = 2.0 * 2 * job.target * decoder.d_model * decoder.vocab_size
    head *= 1.5 if job.method == "full" else 1
    return job.accumulation * job.batch * (once + back + again + head)


def step_time(job: Job, zero: Zero, cluster: Cluster) -> StepTime:
    """Of one step on this cluster; see README's and `--help`'s words on what it leaves out."""
    compute = flops(job) / (cluster.chip.flops * cluster.efficiency)
    transfers = per_step(job, zero, cluster)
    hidden = sum(transfer_time(each, cluster) for each in transfers if each.overlaps)
    exposed = sum(transfer_time(each, cluster) for each in transfers if not each.overlaps)
    trained = sizes(weights(job))["trained"]
    mine = trained if zero.stage == 0 else trained / cluster.world_size
    # masters, moments and gradients are read, and all but gradients written
    optimizer = 28 * mine / cluster.chip.bandwidth
    if zero.offload_optimizer:
        optimizer = mine / CPU_ADAM + 2 * job.bytes_per_value * mine / 25e9
    if zero.offload_param:
        hidden += 2 * memory(job, zero, cluster).host / 25e9  # over PCIe, in both passes
    return StepTime(
        compute=compute, exposed=exposed + max(0.0, hidden - HIDDEN * compute), optimizer=optimizer
    )


def transfer_time(each: Collective, cluster: Cluster) -> float:
    """Of one collective: its bytes over the slowest link it crosses, and a latency for every round."""
    if each.ranks < 2:
        return 0.0
    crosses = each.ranks > cluster.gpus_per_node
    rate = min(cluster.network, cluster.chip.link) if crosses else cluster.chip.link
    nodes = -(-each.ranks // cluster.gpus_per_node)
    rounds = 2 * (nodes - 1) * cluster.latency + 20e-6
    return each.sent(cluster.backend) / rate + each.calls * rounds


def _forward(job: Job) -> tuple[float, float, float]:
    """Of one example's blocks: products with frozen weights, with trained ones, and scores of attention."""
    shape, source, target = job.shape, job.encoder_tokens, job.target
    encoder, decoder = shape.of("encoder"), shape.of("decoder")
    frozen = sum(
        2.0 * job.tokens_at(site) * math.prod(site.widths(shape.base_shape)) for site in shape.sites
    )
    scores = 4.0 * encoder.layers * encoder.inner * source**2
    scores += 4.0 * decoder.layers * decoder.inner * (target**2 + target * source)
    if job.method == "full":
        return 0.0, frozen, scores
    experts = sum(_expert_flops(job, site) for site in shape.sites)
    if job.method == "source":
        return frozen, experts, scores
    trained = sum(
        4.0 * stack.layers * tokens * stack.d_model * (stack.d_model // job.adapter_reduction)
        for stack, tokens in ((encoder, source), (decoder, target))
    )
    return frozen + experts, trained, scores


def _expert_flops(job: Job, site: Site) -> float:
    """Latents, their sum, and at an FFN's output z against the experts for the sparsity loss; as many products back."""
    ranks = job.mixed_at(site) if job.experts else job.ranks_at(site)
    inputs, outputs = site.widths(job.shape.base_shape)
    again = outputs if site.is_ffn_output and job.method == "pemt" else 0
    return 2.0 * job.tokens_at(site) * sum(ranks) * (inputs + outputs + again)
