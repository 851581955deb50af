"""What linear layers with experts share: what a gate reads, generating a token at a time, LoRA experts laid out.

    class             in the place of          experts      target adapter, sparsity loss
    LoraMixture       an FFN's output          LoRA         both
    BottleneckMixture an FFN's output          bottleneck   both
    AdapterProjection an FFN's output          none         the adapter
    SiteMixture       another linear layer     LoRA         none

Shapes: B batch, S tokens, F input width, D output width, K experts, N ranks of all, C width of the gate's context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource
from pemt.model.factors import rank_factors, side_by_side
from pemt.model.gate import GateKind, make_gate
from pemt.model.inject import LinearSite
from pemt.model.lazy import is_lazy, lazy_parameter, value_of
from pemt.ops import ffn_output, gated_output, prompt_mean
from pemt.ops.linear import mixture_step


class GatedLinear(nn.Module, ABC):
    """A frozen linear layer, and a gate over the experts on it.

    The gate's context is the layer's input in the encoder and the encoder's last state in the decoder,
    each as its mean over the prompt. Source: arXiv 2402.15082, for the FFNs' output projections.
    """

    weight: nn.Parameter

    def add_gate(
        self,
        site: LinearSite,
        sources: Sequence[ExpertSource],
        context: PassContext,
        kind: GateKind,
    ) -> None:
        """Give the layer its gate over the sources that are on it; `weight` is there, and the site still the base's."""
        self.in_decoder = site.in_decoder
        self.gate = make_gate(kind, site.gate_width, len(sources), like=self.weight)
        self.source_names = [source.name for source in sources]
        self.context = context
        self._prepared: tuple[Tensor | int, Any] | None = None

    @property
    def _gate_context(self) -> Tensor | int:
        """What the gate reads, as `pemt.ops.gated_output` takes it."""
        if not self.in_decoder:
            return self.context.prompt_length
        assert self.context.encoder_prompt_BD is not None, "the hook on the decoder has not run"
        return self.context.encoder_prompt_BD

    def _gates(self, x_BSF: Tensor) -> Tensor:
        """The gates [B,K] of an input."""
        context = self._gate_context
        gates_BK: Tensor = self.gate(
            prompt_mean(x_BSF, context) if isinstance(context, int) else context
        )
        return gates_BK

    def _generate_step(self, x_BSF: Tensor) -> Tensor:
        """One step of `generate` in the decoder: y [B,S,D], with the gates of its first step."""
        prompt_BD = self._gate_context
        if self._prepared is None or self._prepared[0] is not prompt_BD:
            gates_BK = self._gates(x_BSF)
            self.context.record_generate_gates(gates_BK)
            self._prepared = prompt_BD, self.prepare_step(gates_BK)
        return self.generate_step(x_BSF, self._prepared[1])

    @abstractmethod
    def prepare_step(self, gates_BK: Tensor) -> Any:
        """What `generate_step` needs of the gates; once for all steps of a `generate`."""

    @abstractmethod
    def generate_step(self, x_BSF: Tensor, prepared: Any) -> Tensor:
        """y [B,S,D], for one step after another with the same gates."""


class LoraExperts(GatedLinear):
    """LoRA experts side by side, as `pemt.ops` takes them; no expert's output is ever made.

    Their factors are split anew for it, each expert's up projection into an isometry; the sources keep theirs.
    `weight` is stacked: the layer's own [D,F] over the down projections [N,F], so that x is read once.
    """

    def add_experts(self, site: LinearSite, sources: Sequence[ExpertSource]) -> None:
        """Lay the experts of the sources, all of which are on the layer, beside its own weight."""
        factors = side_by_side(site.name, sources)
        self.ranks, self.scales = factors.ranks, factors.scales
        own, (outputs, inputs) = self.weight, self.weight.shape
        self.sizes = outputs, sum(self.ranks)
        stacked = partial(_stacked, own, factors.down)
        self.weight = frozen((sum(self.sizes), inputs), stacked, like=own)
        self.up = frozen(self.sizes, factors.up, like=own)

    @property
    def external_parameters(self) -> tuple[Tensor, ...]:
        """What it computes with and its submodules own: ZeRO-3 must gather them with it."""
        return () if self.gate.weight is None else (self.gate.weight,)

    def _mix(self, x_BSF: Tensor, **options: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B,S,D], the loss if it is wanted, the gates [B,K]; options are those of `pemt.ops.ffn_output`."""
        experts = (self.scales, self.ranks)
        if self.gate.weight is None:
            gates_BK = self._gates(x_BSF)
            mixed = ffn_output(x_BSF, self.weight, self.up, gates_BK, *experts, **options)
            return *mixed, gates_BK
        gate = self.gate.weight, self._gate_context
        return gated_output(x_BSF, self.weight, self.up, *gate, *experts, **options)

    def prepare_step(self, gates_BK: Tensor) -> Tensor:
        """g_k s_k of every sample, once per rank [B,1,N]."""
        return rank_factors(gates_BK, self.scales, self.ranks, like=self.weight)

    def generate_step(self, x_BSF: Tensor, prepared: Tensor) -> Tensor:
        """y [B,S,D]; `prepared` is [B,1,N]."""
        # Not folded into a weight of each sample: see docs/serving.md.
        weight_DF, down_NF = self.weight.split(self.sizes)
        return mixture_step(x_BSF, weight_DF, down_NF, self.up, prepared)


def _stacked(weight_DF: nn.Parameter, downs: Callable[[], Tensor]) -> Tensor:
    """[D+N,F]: the layer's own weight, and under it the down projections."""
    own = value_of(weight_DF)
    return torch.cat([own, downs().to(own)])


def frozen(shape: tuple[int, ...], make: Callable[[], Tensor], *, like: Tensor) -> nn.Parameter:
    """What `make` gives, frozen; a parameter, so that ZeRO-3 partitions it.

    Unread where the base is: it is made as it is placed, and no rank holds all of them.
    """
    if is_lazy(like):
        return lazy_parameter(shape, like.dtype, make)
    return nn.Parameter(make().to(like), requires_grad=False)
