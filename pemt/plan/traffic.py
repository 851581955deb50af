"""What a step puts on the wire: every collective, its size, and what a rank sends for it.

Ring algorithms, which both NCCL and gloo use: of S bytes on W ranks, a rank sends 2 (W-1)/W S for an
all-reduce and (W-1)/W S for an all-gather or a reduce-scatter. gloo has no reduce-scatter: torch makes it
from an all-reduce. In a ring over nodes one rank of each node sends to the next one, so the bytes out of
a node's network are those that a rank sends. NCCL's tree, which it may choose for small sizes, sends as
much or less. Received is as much as sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pemt.plan.count import Weight, sizes, weights
from pemt.plan.gather import gathered, is_kept
from pemt.plan.job import Cluster, Job, Zero
from pemt.plan.memory import padded, share

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast"]


@dataclass(frozen=True, kw_only=True)
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
    kind: Kind
    size: float
    calls: int
    ranks: int
    overlaps: bool

    def sent(self, backend: str) -> float:
        """Bytes that a rank sends in a step."""
        if self.ranks < 2:
            return 0.0
        rounds = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "broadcast": 0}[self.kind]
        if self.kind == "reduce-scatter" and backend == "gloo":
            rounds = 2
        if self.kind == "broadcast":
            return (
                self.size
            )  # along a chain or a tree; rank 0 of gloo's tree sends it log2(W) times
        return rounds * self.size * (self.ranks - 1) / self.ranks


def per_step(job: Job, zero: Zero, cluster: Cluster) -> list[Collective]:
    """A step's collectives from the third step on, without those of a few bytes (norms, overflow flags)."""
    found, world = weights(job), cluster.world_size
    if zero.stage == 3:
        return _stage_three(job, zero, cluster, found)
    trained, value = sizes(found)["trained"], job.bytes_per_value
    # Stage 2 reduces the gradients of every micro-batch, stages 0 and 1 the sum of all.
    times = job.accumulation if zero.stage == 2 else 1
    steps = [
        Collective(
            what="gradients",
            kind="all-reduce",
            size=times * trained * value,
            calls=times * max(1, -(-trained // zero.bucket)),
            ranks=world,
            overlaps=zero.buckets == 2,
        )
    ]
    if zero.stage:
        steps.append(
            Collective(
                what="updated weights",
                kind="all-gather",
                size=padded(trained, world) * value,
                calls=1,
                ranks=world,
                overlaps=False,
            )
        )
    return steps


def at_start(job: Job, zero: Zero, cluster: Cluster) -> list[Collective]:
    """What is sent once, when training starts: rank 0's trained weights (see `pemt.engine.placement`).

    At stage 3 DeepSpeed gathers each of them again, to hang its hooks on them.
    """
    found, world = weights(job), cluster.world_size
    trained = [each for each in found if each.role == "trained"]
    size = {
        "broadcast": sum(each.size for each in trained),
        "all-gather": sum(share(each.size, world) * world for each in trained),
    }
    kinds: list[Kind] = ["broadcast", "all-gather"] if zero.stage == 3 else ["broadcast"]
    return [
        Collective(
            what="trained weights",
            kind=kind,
            size=job.bytes_per_value * size[kind],
            calls=len(trained),
            ranks=world,
            overlaps=False,
        )
        for kind in kinds
    ]


def _stage_three(job: Job, zero: Zero, cluster: Cluster, found: list[Weight]) -> list[Collective]:
    world, value = cluster.world_size, job.bytes_per_value
    role = {each.name: each.role for each in found}
    # Every rank's share is rounded up.
    size = {each.name: share(each.size, world) * world for each in found}
    taken = gathered(found, zero).names
    # With a second copy in each node (hpZ) only trained weights, which change, cross nodes, and once.
    local = zero.secondary > 1
    frozen = sum(size[name] for name in taken if role[name] != "trained")
    trained = sum(size[name] for name in taken if role[name] == "trained")
    kept = sum(size[each.name] for each in found if is_kept(each.size, zero))
    gradients = sum(size[each.name] for each in found if each.role == "trained")
    gathered_value = 1 if zero.quantized_weights else value
    times = job.accumulation
    return [
        Collective(
            what="frozen weights",
            kind="all-gather",
            size=times * frozen * gathered_value,
            calls=times * max(1, frozen // max(1, zero.prefetch)),
            ranks=min(zero.secondary, world) if local else world,
            overlaps=True,
        ),
        Collective(
            what="trained weights",
            kind="all-gather",
            size=times * trained * gathered_value,
            calls=times,
            ranks=world,
            overlaps=True,
        ),
        Collective(
            what=f"weights of at most {zero.persistence:,} elements",
            kind="all-gather",
            size=kept * value,
            calls=sum(is_kept(each.size, zero) for each in found),
            ranks=world,
            overlaps=False,
        ),
        Collective(
            what="gradients",
            kind="reduce-scatter",
            size=times * gradients * value,
            calls=times * max(1, -(-gradients // zero.bucket)),
            ranks=world,
            overlaps=True,
        ),
    ]
