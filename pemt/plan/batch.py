"""A recipe's global batch over a cluster's ranks: what each takes at once, how often, and how many there are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pemt.plan.job import PlanError


@dataclass(frozen=True, kw_only=True)
class Division:
    """A global batch: nodes × ranks_per_node × micro_batch × accumulation examples of one optimizer step."""

    nodes: int
    ranks_per_node: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Examples of an optimizer step, all ranks together."""
        return self.nodes * self.ranks_per_node * self.micro_batch * self.accumulation

    def __str__(self) -> str:
        nodes, ranks = self.nodes, self.nodes * self.ranks_per_node
        return (
            f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)} x {self.micro_batch} "
            f"example{'s' * (self.micro_batch > 1)} x {self.accumulation} "
            f"micro-batch{'es' * (self.accumulation > 1)} = {self.global_batch}"
        )


def divide(
    global_batch: int,
    *,
    nodes: int,
    ranks_per_node: int,
    most: int,
    micro_batch: int | None = None,
    accumulation: int | None = None,
    all_ranks: bool = False,
) -> Division:
    """A lower micro-batch first, as few micro-batches as that allows (one in the recipes), then fewer ranks.

    Args:
        global_batch: examples of an optimizer step, which is kept.
        most: examples that a rank takes at once, at most: the recipe's micro-batch.
        micro_batch: examples that it takes at once, exactly; accumulation: micro-batches of a step. None: any.
        all_ranks: use each rank, since micro-batch or accumulation was typed: nothing is given up for it.

    Raises:
        PlanError: the global batch cannot be had on these nodes, with the numbers.
    """
    fewest = ranks_per_node if all_ranks else 1
    for ranks in range(ranks_per_node, fewest - 1, -1):
        each, rest = divmod(global_batch, nodes * ranks)
        if rest:
            continue
        for micro in [micro_batch] if micro_batch else range(min(most, each), 0, -1):
            times, rest = divmod(each, micro)
            if rest == 0 and times and accumulation in (None, times):
                return Division(
                    nodes=nodes, ranks_per_node=ranks, micro_batch=micro, accumulation=times
                )
    typed = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
    }
    given = {name: value for name, value in typed.items() if value is not None}
    raise PlanError(_refusal(global_batch, nodes, ranks_per_node, given, all_ranks))


def _refusal(
    global_batch: int, nodes: int, ranks_per_node: int, given: dict[str, int], all_ranks: bool
) -> str:
    fixed = "".join(f" x {name} {value}" for name, value in given.items())
    at_once = nodes * ranks_per_node * math.prod(given.values())
    if all_ranks:
        way_out = f"leave {' or '.join(given)} out"
    elif given:  # it could not be resumed with another one
        way_out = "as which the run in output_dir was begun: resume on fewer nodes, take another output_dir"
    else:
        dividing = [n for n in range(1, min(global_batch, 64) + 1) if global_batch % n == 0]
        way_out = f"take {', '.join(map(str, dividing))} nodes"
    return (
        f"global batch: found {nodes} node{'s' * (nodes > 1)} x {ranks_per_node} ranks{fixed} = {at_once} examples at "
        f"least, which does not divide the recipe's global batch of {global_batch}; {way_out}, or set the global batch "
        f"itself (--global_batch_size, in launchers GLOBAL_BATCH) to a multiple of {at_once}"
    )
