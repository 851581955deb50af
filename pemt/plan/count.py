"""Every weight of a run's model, by formula: names and shapes as `named_parameters` gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pemt.model import Site
from pemt.plan.job import Job

Role = Literal["frozen", "expert", "trained"]


class Weight(NamedTuple):
    """One parameter; `expert` is frozen too, but comes from the bank. Of a frozen one `experts` values do, too."""

    name: str
    shape: tuple[int, ...]
    role: Role
    experts: int = 0

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The module that owns it, which is what ZeRO-3 gathers for."""
        return self.name.rpartition(".")[0]


def weights(job: Job) -> list[Weight]:
    """All parameters, tied ones once, in the order of a pass, which is the model's own but for T5Gemma."""
    found = [each._replace(name=f"base.{each.name}") for each in _base(job)]
    d_model = job.shape.d_model
    if job.method == "full":
        return [each._replace(role="trained") for each in found]
    found.append(Weight("prompt.prompt", (job.prompt_tokens, d_model), "trained"))
    if job.experts:
        found.append(Weight("prompt.sources", (job.source_prompt_tokens, d_model), "expert"))
    return found


def sizes(found: list[Weight]) -> dict[Role, int]:
    """Elements by role."""
    total: dict[Role, int] = {"frozen": 0, "expert": 0, "trained": 0}
    for weight in found:
        total[weight.role] += weight.size - weight.experts
        total["expert"] += weight.experts
    return total


def _base(job: Job) -> Iterator[Weight]:
    shape, family = job.shape, job.shape.family
    embedded: set[str] = set()
    for stack, embedding in zip(family.stacks, family.embeddings, strict=True):
        sizes = shape.of(stack)
        if embedding not in embedded:
            yield Weight(f"{embedding}.weight", (sizes.vocab_size, sizes.d_model), "frozen")
        embedded.add(embedding)
        for layer in range(sizes.layers):
            yield from _block(job, stack, layer)
        yield _norm(job, f"{family.stacks[stack]}.{family.final_norm}", sizes.d_model)
    if not shape.tied:
        yield Weight(f"{family.head}.weight", (sizes.vocab_size, sizes.d_model), "frozen")


def _block(job: Job, stack: str, layer: int) -> Iterator[Weight]:
    shape, family = job.shape, job.shape.family
    block, d_model = family.block(stack, layer), shape.of(stack).d_model
    for name, part in family.parts[stack].items():
        for site in shape.blocks[stack, layer]:
            if site.part == name:
                yield from _linear(job, site)
        if family.position_bias and name == "self" and (layer == 0 or shape.bias_everywhere):
            bias = f"{block}.{part.module}.{family.position_bias}.weight"
            yield Weight(bias, (shape.buckets, shape.num_heads), "frozen")
        for norm in part.norms:
            yield _norm(job, f"{block}.{norm}", d_model)


def _linear(job: Job, site: Site) -> Iterator[Weight]:
    """What stands in a linear layer's place."""
    name, (inputs, outputs) = site.module, site.widths(job.shape.base_shape)
    mixed = job.mixed_at(site)
    # under the layer's own weight are the experts' down projections: see `LoraMixture`
    stacked = (outputs + sum(mixed), inputs)
    yield Weight(f"{name}.weight", stacked, "frozen", experts=sum(mixed) * inputs)
    if job.method == "source":
        for rank in job.ranks_at(site):
            yield Weight(f"{name}.expert.down", (rank, inputs), "trained")
            yield Weight(f"{name}.expert.up", (outputs, rank), "trained")
    if mixed:
        yield Weight(f"{name}.up", (outputs, sum(mixed)), "expert")
    if site.is_ffn_output and job.has_adapters:
        inner = outputs // job.adapter_reduction
        yield Weight(f"{name}.adapter.down.weight", (inner, outputs), "trained")
        yield Weight(f"{name}.adapter.down.bias", (inner,), "trained")
        yield Weight(f"{name}.adapter.up.weight", (outputs, inner), "trained")
        yield Weight(f"{name}.adapter.up.bias", (outputs,), "trained")
    if mixed and job.learned_gates:
        # the decoder's read the encoder's states
        width = job.shape.d_model if site.in_decoder else inputs
        yield Weight(f"{name}.gate.weight", (width, len(mixed)), "trained")


def _norm(job: Job, name: str, width: int) -> Weight:
    return Weight(f"{name}.weight", (width,), "trained" if job.trains_norms else "frozen")
