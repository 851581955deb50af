"""A recipe's global batch over a cluster's ranks: what each takes at once, how often, and how many there are."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a division must keep.

    Args:
        global_batch: examples of an optimizer step.
        most: examples that a rank takes at once, at most: the recipe's micro-batch.
        micro_batch: examples that it takes at once, exactly; accumulation: micro-batches of a step. None: any.
        all_ranks: use each rank, since micro-batch or accumulation was typed: nothing is given up for it.
    """

    global_batch: int
    most: int
    micro_batch: int | None = None
    accumulation: int | None = None
    all_ranks: bool = False


def divide(wanted: Wanted, *, nodes: int, ranks_per_node: int) -> Division:
    """A lower micro-batch first, as few micro-batches as that allows (one in the recipes), then fewer ranks.

    Raises:
        PlanError: the global batch cannot be had on these nodes, with the numbers.
    """
    fewest = ranks_per_node if wanted.all_ranks else 1
    for ranks in range(ranks_per_node, fewest - 1, -1):
        each, rest = divmod(wanted.global_batch, nodes * ranks)
        if rest:
            continue
        fixed = wanted.micro_batch
        for micro in [fixed] if fixed else range(min(wanted.most, each), 0, -1):
            accumulation, rest = divmod(each, micro)
            if rest == 0 and accumulation and wanted.accumulation in (None, accumulation):
                return Division(
                    nodes=nodes, ranks_per_node=ranks, micro_batch=micro, accumulation=accumulation
                )
    raise PlanError(_refusal(wanted, nodes, ranks_per_node))


def _refusal(wanted: Wanted, nodes: int, ranks_per_node: int) -> str:
    total, ranks = wanted.global_batch, nodes * ranks_per_node
    typed = {
        "per_device_train_batch_size": wanted.micro_batch,
        "gradient_accumulation_steps": wanted.accumulation,
    }
    fixed = "".join(f" x {name} {value}" for name, value in typed.items() if value is not None)
    at_once = ranks * (wanted.micro_batch or 1) * (wanted.accumulation or 1)
    dividing = [each for each in range(1, min(total, 64) + 1) if total % each == 0]
    if wanted.all_ranks:
        given = " or ".join(name for name, value in typed.items() if value is not None)
        way_out = f"leave {given} out"
    elif fixed:  # it could not be resumed with another one
        way_out = "as which the run in output_dir was begun: resume on fewer nodes, take another output_dir"
    else:
        way_out = f"take {', '.join(map(str, dividing))} nodes"
    return (
        f"global batch: found {nodes} node{'s' * (nodes > 1)} x {ranks_per_node} ranks{fixed} = {at_once} examples at "
        f"least, which does not divide the recipe's global batch of {total}; {way_out}, or set the global batch "
        f"itself (--global_batch_size, in launchers GLOBAL_BATCH) to a multiple of {at_once}"
    )
