"""Every weight of a run's model, by formula: names and shapes as `named_parameters` gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pemt.model import Site
from pemt.plan.job import Job

Role = Literal["frozen", "expert", "trained"]


@dataclass(frozen=True)
class Weight:
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
    """All parameters, tied ones once, in the model's order."""
    found = [
        Weight(f"base.{name}", shape, "trained" if job.method == "full" else role, *experts)
        for name, shape, role, *experts in _base(job)
    ]
    d_model = job.shape.d_model
    if job.method != "full":
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


_Row = tuple[str, tuple[int, ...], Role] | tuple[str, tuple[int, ...], Role, int]  # as `Weight`


def _base(job: Job) -> Iterator[_Row]:
    shape = job.shape
    embedding = (shape.vocab_size, shape.d_model)
    yield "shared.weight", embedding, "frozen"
    for stack, layers in (("encoder", shape.num_layers), ("decoder", shape.num_decoder_layers)):
        for layer in range(layers):
            yield from _block(job, stack, layer)
        yield f"{stack}.final_layer_norm.weight", (shape.d_model,), _norm(job)
    if not shape.tied:
        yield "lm_head.weight", embedding, "frozen"


def _block(job: Job, stack: str, layer: int) -> Iterator[_Row]:
    shape = job.shape
    sites = shape.blocks[stack, layer]
    for part in dict.fromkeys(site.part for site in sites):
        of_part = [site for site in sites if site.part == part]
        for site in of_part:
            yield from ((f"{site.module}.{name}", *rest) for name, *rest in _linear(job, site))
        module = of_part[0].module.rpartition(".")[0]
        if part == "self" and (layer == 0 or shape.bias_everywhere):
            bias = f"{module}.relative_attention_bias.weight"
            yield bias, (shape.buckets, shape.num_heads), "frozen"
        yield f"{module.rpartition('.')[0]}.layer_norm.weight", (shape.d_model,), _norm(job)


def _linear(job: Job, site: Site) -> Iterator[_Row]:
    """What stands in a linear layer's place."""
    d_model, (inputs, outputs) = job.shape.d_model, site.widths(job.shape.base_shape)
    mixed = job.mixed_at(site)
    # at an FFN's output `pemt.ops` wants the down projections under the layer's own weight
    under = sum(mixed) if site.is_ffn_output else 0
    yield "weight", (outputs + under, inputs), "frozen", under * inputs
    if job.method == "source":
        for rank in job.ranks_at(site):
            yield "expert.down", (rank, inputs), "trained"
            yield "expert.up", (outputs, rank), "trained"
    if mixed:
        if not under:
            yield "down", (sum(mixed), inputs), "expert"
        yield "up", (outputs, sum(mixed)), "expert"
    if site.is_ffn_output and job.method in ("pemt", "adapter"):
        inner = d_model // job.adapter_reduction
        yield "adapter.down.weight", (inner, d_model), "trained"
        yield "adapter.down.bias", (inner,), "trained"
        yield "adapter.up.weight", (d_model, inner), "trained"
        yield "adapter.up.bias", (d_model,), "trained"
    if mixed and job.learned_gates:
        yield "gate.weight", (d_model if site.in_decoder else inputs, len(mixed)), "trained"


def _norm(job: Job) -> Role:
    adapts = job.method in ("pemt", "adapter") and job.train_layer_norms
    return "trained" if adapts else "frozen"
