"""Every weight of a run's model, by formula: names and shapes as `named_parameters` gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pemt.plan.job import Job

Role = Literal["frozen", "expert", "trained"]


@dataclass(frozen=True)
class Weight:
    """One parameter; `expert` is frozen too, but comes from the bank."""

    name: str
    shape: tuple[int, ...]
    role: Role

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
        Weight(f"base.{name}", shape, "trained" if job.method == "full" else role)
        for name, shape, role in _base(job)
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
        total[weight.role] += weight.size
    return total


_Row = tuple[str, tuple[int, ...], Role]


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
    block = f"{stack}.block.{layer}.layer"
    attentions = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder")
    for place, attention in enumerate(attentions):
        for each in "qkv":
            yield (
                f"{block}.{place}.{attention}.{each}.weight",
                (shape.inner, shape.d_model),
                "frozen",
            )
        yield f"{block}.{place}.{attention}.o.weight", (shape.d_model, shape.inner), "frozen"
        if place == 0 and (layer == 0 or shape.bias_everywhere):
            bias = f"{block}.{place}.{attention}.relative_attention_bias.weight"
            yield bias, (shape.buckets, shape.num_heads), "frozen"
        yield f"{block}.{place}.layer_norm.weight", (shape.d_model,), _norm(job)
    ffn = f"{block}.{len(attentions)}"
    for wi in ("wi_0", "wi_1") if shape.gated else ("wi",):
        yield f"{ffn}.DenseReluDense.{wi}.weight", (shape.d_ff, shape.d_model), "frozen"
    for name, size, role in _projection(job, stack):
        yield f"{ffn}.DenseReluDense.wo.{name}", size, role
    yield f"{ffn}.layer_norm.weight", (shape.d_model,), _norm(job)


def _projection(job: Job, stack: str) -> Iterator[_Row]:
    """What stands in `wo`'s place."""
    d_model, d_ff = job.shape.d_model, job.shape.d_ff
    # as `pemt.ops` wants them: the down projections under wo's weight, ranks of at most d_model
    total = sum(min(rank, d_model) for rank in job.ranks) if job.experts else 0
    yield "weight", (d_model + total, d_ff), "frozen"
    if job.method == "source":
        (rank,) = job.ranks
        yield "expert.down", (rank, d_ff), "trained"
        yield "expert.up", (d_model, rank), "trained"
    if job.experts:
        yield "up", (d_model, total), "expert"
    if job.method in ("pemt", "adapter"):
        inner = d_model // job.adapter_reduction
        yield "adapter.down.weight", (inner, d_model), "trained"
        yield "adapter.down.bias", (inner,), "trained"
        yield "adapter.up.weight", (d_model, inner), "trained"
        yield "adapter.up.bias", (d_model,), "trained"
    if job.experts:
        width = d_model if stack == "decoder" else d_ff
        yield "gate.weight", (width, job.experts), "trained"


def _norm(job: Job) -> Role:
    adapts = job.method in ("pemt", "adapter") and job.train_layer_norms
    return "trained" if adapts else "frozen"
