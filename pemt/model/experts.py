"""Stage 1: the trained expert on a linear layer, and the form it is handed on in.

Shapes: B batch, S tokens, D output width, F input width (of an FFN's output projection: d_model, d_ff),
P prompt tokens, R rank or inner width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pemt.config import ExpertConfig, PemtError
from pemt.model.families import STACKS, stack_size
from pemt.model.sites import Site, sites_of
from pemt.ops.linear import linear


class ModelError(PemtError):
    """A base model, an expert or a prompt that do not go together."""


TENSORS = {
    "lora": ("down", "up"),
    "bottleneck": ("down.weight", "down.bias", "up.weight", "up.bias"),
}


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """One source task as stage 2 needs it.

    Args:
        name: the source task.
        kind: `lora` or `bottleneck`.
        rank: LoRA rank, of the site that has the most, or a bottleneck's inner width.
        alpha: a LoRA expert's output is multiplied by alpha / rank at each of its sites; no effect on a bottleneck.
        weights: by `<site>.<tensor>`, as `expert_shapes` lists them; a LoRA is on any sites, a bottleneck on every FFN.
        prompt_PD: the task prompt.
        base_sha256: `base_digest` of the base model it was trained on; None where not known.
    """

    name: str
    kind: Literal["lora", "bottleneck"]
    rank: int
    alpha: float
    weights: Mapping[str, Tensor]
    prompt_PD: Tensor
    base_sha256: str | None = None

    def is_on(self, site: str) -> bool:
        """Whether the expert has tensors for this site."""
        return f"{site}.{TENSORS[self.kind][0]}" in self.weights

    def check(self, shape: Mapping[str, Any]) -> None:
        """Raise `ModelError` unless every tensor fits a base model of this `base_shape`."""
        owner = f"source `{self.name}`"
        expected = self._expected(shape)
        for key in sorted(expected.keys() ^ self.weights.keys()):
            problem = "is missing" if key in expected else "does not belong there"
            raise ModelError(
                f"{owner}: tensor `{key}` {problem}; needed are all of a {self.kind} expert on linear layers of this "
                f"base model ({shape['num_layers']} encoder, {shape['num_decoder_layers']} decoder layers)"
            )
        for key, size in expected.items():
            found = tuple(self.weights[key].shape)
            if found != size:
                raise ModelError(
                    f"{owner}: tensor `{key}` is {list(found)}, "
                    f"this base model and rank {self.rank} need {list(size)}"
                )
        check_prompt(self.prompt_PD, shape["d_model"], owner=owner)

    def _expected(self, shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """`expert_shapes` of this expert's own sites; a site may have a lower rank than the largest."""
        if self.kind != "lora":
            return expert_shapes(self.kind, self.rank, shape)
        owners = {key.rpartition(".")[0] for key in self.weights}
        every = sites_of(shape)
        sites = [site for site in every if site.name in owners]
        sites = sites or [site for site in every if site.is_ffn_output]
        ranks = {site: self._rank_at(site.name) for site in sites}
        if self.rank not in ranks.values():
            ranks = dict.fromkeys(sites, self.rank)
        return {
            key: size
            for site, rank in ranks.items()
            for key, size in expert_shapes("lora", rank, shape, [site]).items()
        }

    def _rank_at(self, site: str) -> int:
        down_RF = self.weights.get(f"{site}.down")
        rows = 0 if down_RF is None or down_RF.dim() == 0 else len(down_RF)
        return rows if 0 < rows < self.rank else self.rank


def check_bottleneck(shape: Mapping[str, Any]) -> None:
    """Raise `ModelError` where encoder and decoder differ in d_ff, and with it a bottleneck's inner width."""
    widths = [stack_size(shape, stack, "d_ff") for stack in STACKS]
    if len(set(widths)) > 1:
        raise ModelError(
            f"expert.kind: found bottleneck, whose inner width would be of d_ff {widths[0]} in this base model's "
            f"encoder and of {widths[1]} in its decoder; allowed is lora"
        )


def check_prompt(prompt_PD: Tensor, d_model: int, *, owner: str) -> None:
    """Raise `ModelError` unless the prompt is [P,D] with at least one token."""
    if prompt_PD.dim() != 2 or len(prompt_PD) == 0 or prompt_PD.shape[1] != d_model:
        raise ModelError(
            f"{owner}: the prompt is {list(prompt_PD.shape)}, "
            f"this base model needs [tokens, {d_model}]"
        )


def expert_shapes(
    kind: str, rank: int, shape: Mapping[str, Any], sites: Sequence[Site] | None = None
) -> dict[str, tuple[int, ...]]:
    """The tensors of an expert, by `<site>.<tensor>`.

    Args:
        kind: `lora` or `bottleneck`.
        rank: LoRA rank, or inner width.
        shape: `base_shape` of the base model.
        sites: that the expert is on; default: every FFN's output projection.
    """
    chosen = [site for site in sites_of(shape) if site.is_ffn_output] if sites is None else sites
    shapes: dict[str, tuple[int, ...]] = {}
    for site in chosen:
        inputs, outputs = site.widths(shape)
        sizes: list[tuple[int, ...]] = [(rank, inputs), (outputs, rank)]
        if kind != "lora":
            sizes = [(rank, inputs), (rank,), (outputs, rank), (outputs,)]
        shapes |= {
            f"{site.name}.{key}": size for key, size in zip(TENSORS[kind], sizes, strict=True)
        }
    return shapes


class Trainable(nn.Module):
    """A module that declares its trained parameters: all that it has, unless it says otherwise."""

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What this module trains; what child `Trainable`s declare may be among it."""
        yield from self.parameters()


class LoraExpert(Trainable):
    """o = (alpha/R) · (x downᵀ) upᵀ, both factors Kaiming-uniform (a = √5) at the start."""

    def __init__(self, d_ff: int, d_model: int, *, rank: int, alpha: float, like: Tensor) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(like.new_empty(rank, d_ff))
        self.up = nn.Parameter(like.new_empty(d_model, rank))
        for factor in (self.down, self.up):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def forward(self, x_BSF: Tensor, ffn_input_BSD: Tensor | None) -> Tensor:
        """o [B,S,D]; `ffn_input_BSD` is not used."""
        return self.scale * linear(linear(x_BSF, self.down), self.up)


class BottleneckExpert(Trainable):
    """o = up(gelu_new(down(x))) + the FFN's layer-normed input."""

    def __init__(self, d_ff: int, d_model: int, *, inner: int, like: Tensor) -> None:
        super().__init__()
        self.down = adapter_linear(d_ff, inner, like)
        self.up = adapter_linear(inner, d_model, like)

    def forward(self, x_BSF: Tensor, ffn_input_BSD: Tensor | None) -> Tensor:
        """o [B,S,D]; `ffn_input_BSD` is the residual, the FFN's layer-normed input."""
        assert ffn_input_BSD is not None, "the hook on the FFN has not run"
        return self.up(F.gelu(self.down(x_BSF), approximate="tanh")) + ffn_input_BSD


def adapter_linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """A linear layer as adapters start: weights normal(0, 0.01), biases zero."""
    layer = nn.Linear(inputs, outputs, dtype=like.dtype, device=like.device)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def inner_width(config: ExpertConfig, d_ff: int) -> int:
    """R of an expert: the LoRA rank, or a bottleneck's d_ff // reduction_factor.

    Raises:
        ModelError: the reduction factor leaves nothing of d_ff.
    """
    if config.kind == "lora":
        return config.rank
    if d_ff < config.reduction_factor:
        raise ModelError(
            f"expert.reduction_factor: found {config.reduction_factor}, "
            f"allowed is at most this base model's d_ff, {d_ff}"
        )
    return d_ff // config.reduction_factor


class SourceProjection(nn.Module):
    """In a linear layer's place in stage 1: the frozen projection plus one trained expert."""

    def __init__(self, weight: nn.Parameter, config: ExpertConfig) -> None:
        super().__init__()
        d_model, d_ff = weight.shape
        inner = inner_width(config, d_ff)
        self.weight = weight
        self.expert = (
            LoraExpert(d_ff, d_model, rank=inner, alpha=config.alpha, like=weight)
            if config.kind == "lora"
            else BottleneckExpert(d_ff, d_model, inner=inner, like=weight)
        )
        self.ffn_input_BSD: Tensor | None = None

    def forward(self, x_BSF: Tensor) -> Tensor:
        """The layer's own output + o, [B,S,D]."""
        ffn_input_BSD, self.ffn_input_BSD = self.ffn_input_BSD, None
        return linear(x_BSF, self.weight) + self.expert(x_BSF, ffn_input_BSD)
