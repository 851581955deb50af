"""Stage 2, in the place of a linear layer: frozen experts of each kind, and what a site gets.

Shapes: B batch, S tokens, F input width, D output width, K experts, R rank of one expert, N ranks of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt.config import AdapterConfig, MixtureConfig
from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource, ModelError
from pemt.model.gated import GatedLinear, TargetAdapter
from pemt.model.inject import LinearSite
from pemt.model.lazy import is_lazy, lazy_parameter, value_of
from pemt.ops import ffn_output, gated_output
from pemt.ops.checks import MAX_EXPERTS
from pemt.ops.linear import linear, mixture_step
from pemt.ops.orthonormal import Split, split
from pemt.ops.packed import rank_factors


class LoraMixture(GatedLinear):
    """LoRA experts side by side, as `pemt.ops` takes them; no expert's output is ever made.

    Each expert is split anew, its up projection into orthonormal columns; the sources keep their own factors.
    `weight` is stacked: the layer's own [D,F] over the down projections [N,F], so that x is read once; `up` is [D,N].
    """

    def add_experts(self, site: LinearSite, sources: Sequence[ExpertSource]) -> None:
        if len(sources) > MAX_EXPERTS:
            raise ModelError(
                f"source_tasks: found {len(sources)} experts on {site.name}, allowed are at most {MAX_EXPERTS} on a "
                "layer; name fewer, or set mixture.top_sources"
            )
        downs, ups = (
            [source.weights[f"{site.name}.{factor}"] for source in sources]
            for factor in ("down", "up")
        )
        splits = [split(up_DR) for up_DR in ups]
        self.ranks = [len(each.mix) for each in splits]
        self.scales = [
            source.alpha / source.rank * each.size
            for source, each in zip(sources, splits, strict=True)
        ]
        own, (outputs, inputs) = self.weight, self.weight.shape
        self.sizes = outputs, sum(self.ranks)
        # a few numbers to keep
        mixes = [replace(each, basis=each.basis.new_empty(0)) for each in splits]
        stacked = partial(_stacked, own, mixes, downs)
        self.weight = frozen((sum(self.sizes), inputs), stacked, like=own)
        self.up = frozen(self.sizes, partial(_bases, ups), like=own)

    @property
    def external_parameters(self) -> tuple[Tensor, ...]:
        """What it computes with and its submodules own: ZeRO-3 must gather them with it."""
        gate = () if self.gate is None else (self.gate.weight,)
        return *gate, *self.adapter_tensors

    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        experts = (self.scales, self.ranks)
        options: dict[str, Any] = {
            "adapter": self.adapter_tensors,
            "sparsity": sparsity,
            "token_weights": self.token_weights_BS if sparsity else None,
        }
        if self.gate is None:
            gates_BK = self._gates(x_BSF)
            mixed = ffn_output(x_BSF, self.weight, self.up, gates_BK, *experts, **options)
            return *mixed, gates_BK
        gate = self.gate.weight, self._gate_context
        return gated_output(x_BSF, self.weight, self.up, *gate, *experts, **options)

    def prepare_step(self, gates_BK: Tensor) -> Tensor:
        """g_k s_k of every sample, once per rank [B,1,N]."""
        return rank_factors(gates_BK, self.scales, self.ranks)[:, None].to(self.weight.dtype)

    def generate_step(self, x_BSF: Tensor, prepared: Tensor) -> Tensor:
        # Not folded into a weight of each sample: see docs/serving.md.
        weight_DF, down_NF = self.weight.split(self.sizes)
        return mixture_step(x_BSF, weight_DF, down_NF, self.up, prepared)


def _stacked(
    weight_DF: nn.Parameter, splits: Sequence[Split], downs_RF: Sequence[Tensor]
) -> Tensor:
    """[D+N,F]: the layer's own weight, and under it the down projections that go with `_bases`."""
    own = value_of(weight_DF)
    downs = [each.down(down_RF) for each, down_RF in zip(splits, downs_RF, strict=True)]
    return torch.cat([own, torch.cat(downs).to(own)])


def _bases(ups_DR: Sequence[Tensor]) -> Tensor:
    """[D,N]: the up projections, each expert's columns orthonormal."""
    return torch.cat([split(up_DR).basis for up_DR in ups_DR], dim=1)


class BottleneckMixture(GatedLinear):
    """Bottleneck experts. Their residual is of full rank: each one's output [B,S,D] is made."""

    def add_experts(self, site: LinearSite, sources: Sequence[ExpertSource]) -> None:
        self.ranks = [source.rank for source in sources]
        self.down = _packed(sources, f"{site.name}.down.weight", self.weight, dim=0)
        self.down_bias = _packed(sources, f"{site.name}.down.bias", self.weight, dim=0)
        self.up = _packed(sources, f"{site.name}.up.weight", self.weight, dim=1)
        self.up_bias = _packed(sources, f"{site.name}.up.bias", self.weight, dim=0)
        self.ffn_input_BSD: Tensor | None = None

    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        assert self.adapter is not None, "a bottleneck is on the FFNs alone"
        gates_BK = self._gates(x_BSF)
        y_BSD, outputs = self._outputs(x_BSF, gates_BK)
        z_BSD = self.adapter(y_BSD)
        loss = self._sparsity(z_BSD, outputs, gates_BK) if sparsity else None
        return z_BSD, loss, gates_BK.detach()

    def prepare_step(self, gates_BK: Tensor) -> Tensor:
        return gates_BK

    def generate_step(self, x_BSF: Tensor, prepared: Tensor) -> Tensor:
        return self._outputs(x_BSF, prepared)[0]

    def _outputs(self, x_BSF: Tensor, gates_BK: Tensor) -> tuple[Tensor, list[Tensor]]:
        """y [B,S,D], and every expert's output [B,S,D]."""
        ffn_input_BSD, self.ffn_input_BSD = self.ffn_input_BSD, None
        assert ffn_input_BSD is not None, "the hook on the FFN has not run"
        latent_BSN = F.gelu(linear(x_BSF, self.down, self.down_bias), approximate="tanh")
        y_BSD = linear(x_BSF, self.weight)
        outputs = []
        experts = zip(
            latent_BSN.split(self.ranks, dim=-1),
            self.up.split(self.ranks, dim=1),
            self.up_bias.chunk(len(self.ranks)),
            gates_BK.to(y_BSD.dtype).unbind(dim=1),
            strict=True,
        )
        for latent_BSR, up_DR, up_bias_D, gate_B in experts:
            # not `linear`, which would copy the slice of `up` every time
            output_BSD = F.linear(latent_BSR, up_DR, up_bias_D) + ffn_input_BSD
            y_BSD = y_BSD + gate_B[:, None, None] * output_BSD
            outputs.append(output_BSD)
        return y_BSD, outputs

    def _sparsity(self, z_BSD: Tensor, outputs: list[Tensor], gates_BK: Tensor) -> Tensor:
        weights_BS = self.token_weights_BS
        if weights_BS is None:
            tokens = z_BSD.shape[0] * z_BSD.shape[1]
            weights_BS = gates_BK.new_full((1, 1), 1 / max(1, tokens))
        loss = gates_BK.new_zeros(())
        for gate, output_BSD in zip(gates_BK.mean(dim=0), outputs, strict=True):
            distance_BS = 1 - F.cosine_similarity(z_BSD.float(), output_BSD.float(), dim=-1)
            loss = loss + gate * (distance_BS * weights_BS).sum()
        return loss


def _packed(sources: Sequence[ExpertSource], key: str, like: Tensor, *, dim: int) -> nn.Parameter:
    """One frozen tensor of all experts side by side."""
    tensors = [source.weights[key] for source in sources]
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return frozen(tuple(shape), partial(torch.cat, tensors, dim=dim), like=like)


def frozen(shape: tuple[int, ...], make: Callable[[], Tensor], *, like: Tensor) -> nn.Parameter:
    """What `make` gives, frozen; a parameter, so that ZeRO-3 partitions it.

    Unread where the base is: it is made as it is placed, and no rank holds all of them.
    """
    if is_lazy(like):
        return lazy_parameter(shape, like.dtype, make)
    return nn.Parameter(make().to(like), requires_grad=False)


class AdapterProjection(nn.Module):
    """An FFN's frozen output projection and the target adapter alone: no expert is there."""

    def __init__(self, site: LinearSite, adapter: AdapterConfig) -> None:
        super().__init__()
        self.weight = site.weight
        self.adapter = TargetAdapter(adapter, self.weight)

    def forward(self, x_BSF: Tensor) -> Tensor:
        """z = adapter(wo(x)), [B,S,D]."""
        return self.adapter(linear(x_BSF, self.weight))


MIXTURES: dict[str, type[GatedLinear]] = {"lora": LoraMixture, "bottleneck": BottleneckMixture}


def mix_at(
    site: LinearSite,
    sources: Sequence[ExpertSource],
    mixture: MixtureConfig,
    adapter: AdapterConfig,
    context: PassContext,
) -> None:
    """Put the sources that are on a layer into it; at an FFN's output there is a target adapter in any case."""
    behind = adapter if site.spec.is_ffn_output else None
    if sources:
        kind = sources[0].kind
        site.replace(MIXTURES[kind](site, sources, context, gate=mixture.gate, adapter=behind))
        if kind == "bottleneck":
            site.pass_ffn_input()
    elif behind is not None:
        site.replace(AdapterProjection(site, behind))
