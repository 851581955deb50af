"""Stage 2, in the place of a linear layer other than an FFN's output: frozen LoRA experts and a gate over them.

Shapes: B batch, S tokens, F input width, D output width, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pemt.config import AdapterConfig, MixtureConfig
from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource
from pemt.model.gate import GateKind
from pemt.model.gated import LoraExperts
from pemt.model.inject import LinearSite
from pemt.model.mixture import MIXTURES, AdapterProjection


class SiteMixture(LoraExperts):
    """y = W x + Σ_k g_k o_k over the sources that are on this layer; reports its gates.

    Target adapter and sparsity loss are at the FFNs' outputs alone.
    """

    def __init__(
        self,
        site: LinearSite,
        sources: Sequence[ExpertSource],
        context: PassContext,
        *,
        gate: GateKind,
    ) -> None:
        super().__init__()
        self.weight = site.weight
        self.add_gate(site, sources, context, gate)
        self.add_experts(site, sources)

    def forward(self, x_BSF: Tensor) -> Tensor:
        """y [B,S,D]; the gates [B,K] go to the pass's context, as it asks for them."""
        context = self.context
        if self.in_decoder and context.is_generating:
            return self._generate_step(x_BSF)
        y_BSD, _, gates_BK = self._mix(x_BSF, sparsity=False)
        if context.is_generating:
            context.record_generate_gates(gates_BK)
        else:
            context.record(gates_BK, None)
        return y_BSD


def mix_at(
    site: LinearSite,
    sources: Sequence[ExpertSource],
    mixture: MixtureConfig,
    adapter: AdapterConfig,
    context: PassContext,
) -> None:
    """Put the sources that are on a layer into it; at an FFN's output there is a target adapter in any case."""
    if not site.spec.is_ffn_output:
        if sources:
            site.replace(SiteMixture(site, sources, context, gate=mixture.gate))
        return
    if not sources:
        site.replace(AdapterProjection(site, adapter))
        return
    kind = sources[0].kind
    site.replace(MIXTURES[kind](site, sources, adapter, context, gate=mixture.gate))
    if kind == "bottleneck":
        site.pass_ffn_input()
