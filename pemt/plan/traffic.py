"""What a step puts on the wire: every collective, its size, and what a rank sends for it.

Ring algorithms, which both NCCL and gloo use: of S bytes on W ranks, a rank sends 2 (W-1)/W S for an
all-reduce and (W-1)/W S for an all-gather or a reduce-scatter. gloo has no reduce-scatter: torch makes it
from an all-reduce. In a ring over nodes one rank of each node sends to the next one, so the bytes out of
a node's network are those that a rank sends. NCCL's tree, which it may choose for small sizes, sends as
much or less. Received is as much as sent.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from pemt.plan.count import Weight, sizes, weights
from pemt.plan.gather import gathered, is_kept
from pemt.plan.job import Cluster, Job, Zero
from pemt.plan.memory import padded, share


@dataclass(frozen=True)
class Collective:
    """A kind of transfer within a step.

    Args:
        what: what travels, in words.
        size: bytes of the whole, per step.
        calls: how many of them a step has, about; each has its latency.
        ranks: that take part, of consecutive numbers.
        overlaps: it continues while the passes compute.
    """

    what: str
    kind: Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]
    _: KW_ONLY
    size: float
    calls: int = 1
    ranks: int
    overlaps: bool = False

    def sent(self, backend: str) -> float:
        """Bytes that a rank sends in a step."""
        if self.ranks < 2:
            return 0.0
        if self.kind == "broadcast":
            return (
                self.size
            )  # along a chain or a tree; rank 0 of gloo's tree sends it log2(W) times
        twice = self.kind == "all-reduce" or (self.kind == "reduce-scatter" and backend == "gloo")
        return (2 if twice else 1) * self.size * (self.ranks - 1) / self.ranks


def per_step(job: Job, zero: Zero, cluster: Cluster) -> list[Collective]:
    """A step's collectives from the third step on, without those of a few bytes (norms, overflow flags)."""
    found, world = weights(job), cluster.world_size
    if zero.stage == 3:
        return _stage_three(job, zero, world, found)
    trained, value = sizes(found)["trained"], job.bytes_per_value
    # Stage 2 reduces the gradients of every micro-batch, stages 0 and 1 the sum of all.
    times = job.accumulation if zero.stage == 2 else 1
    gradients = Collective(
        "gradients",
        "all-reduce",
        size=times * trained * value,
        calls=times * max(1, -(-trained // zero.bucket)),
        ranks=world,
        overlaps=zero.buckets == 2,
    )
    if zero.stage == 0:
        return [gradients]
    size = padded(trained, world) * value
    return [gradients, Collective("updated weights", "all-gather", size=size, ranks=world)]


def at_start(job: Job, zero: Zero, cluster: Cluster) -> list[Collective]:
    """What is sent once, when training starts: rank 0's trained weights (see `pemt.engine.placement`).

    At stage 3 DeepSpeed gathers each of them again, to hang its hooks on them.
    """
    world = cluster.world_size
    trained = [each.size for each in weights(job) if each.role == "trained"]
    size = job.bytes_per_value * sum(trained)
    start = [Collective("trained weights", "broadcast", size=size, calls=len(trained), ranks=world)]
    if zero.stage == 3:
        size = job.bytes_per_value * sum(share(each, world) * world for each in trained)
        start.append(
            Collective("trained weights", "all-gather", size=size, calls=len(trained), ranks=world)
        )
    return start


def _stage_three(job: Job, zero: Zero, world: int, found: list[Weight]) -> list[Collective]:
    role = {each.name: each.role for each in found}
    # Every rank's share is rounded up.
    size = {each.name: share(each.size, world) * world for each in found}
    taken = gathered(found, zero).names
    frozen = sum(size[name] for name in taken if role[name] != "trained")
    trained = sum(size[name] for name in taken if role[name] == "trained")
    kept = [size[each.name] for each in found if is_kept(each.size, zero)]
    gradients = sum(size[each.name] for each in found if each.role == "trained")
    value, times = job.bytes_per_value, job.accumulation
    gathered_value = 1 if zero.quantized_weights else value
    return [
        Collective(
            "frozen weights",
            "all-gather",
            size=times * frozen * gathered_value,
            calls=times * max(1, frozen // max(1, zero.prefetch)),
            # with a second copy in each node (hpZ) only trained weights, which change, cross nodes, and once
            ranks=min(zero.secondary, world) if zero.secondary > 1 else world,
            overlaps=True,
        ),
        Collective(
            "trained weights",
            "all-gather",
            size=times * trained * gathered_value,
            calls=times,
            ranks=world,
            overlaps=True,
        ),
        Collective(
            f"weights of at most {zero.persistence:,} elements",
            "all-gather",
            size=sum(kept) * value,
            calls=len(kept),
            ranks=world,
        ),
        Collective(
            "gradients",
            "reduce-scatter",
            size=times * gradients * value,
            calls=times * max(1, -(-gradients // zero.bucket)),
            ranks=world,
            overlaps=True,
        ),
    ]
