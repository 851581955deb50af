"""Stage 2, in the place of an FFN's `wo`: frozen experts, a gate over them, a target adapter.

Shapes: B batch, S tokens, D d_model, F d_ff, K experts, R rank of one expert, N ranks of all, C width of
the gate's context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt.config import AdapterConfig
from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource, ModelError, adapter_linear
from pemt.model.gate import GateKind
from pemt.model.gated import GatedLinear, LoraExperts, frozen
from pemt.model.inject import LinearSite
from pemt.model.trainable import Trainable
from pemt.ops.linear import linear


class TargetAdapter(Trainable):
    """z = y + up(gelu_new(down(y))), D → D // reduction_factor → D.

    Raises:
        ModelError: the reduction factor leaves nothing of d_model.
    """

    def __init__(self, config: AdapterConfig, like: Tensor) -> None:
        super().__init__()
        d_model = like.shape[0]
        if d_model < config.reduction_factor:
            raise ModelError(
                f"adapter.reduction_factor: found {config.reduction_factor}, "
                f"allowed is at most this base model's d_model, {d_model}"
            )
        self.down = adapter_linear(d_model, d_model // config.reduction_factor, like)
        self.up = adapter_linear(d_model // config.reduction_factor, d_model, like)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Down [H,D], its bias [H], up [D,H], its bias [D]: as `pemt.ops` takes an adapter."""
        down, up = self.down, self.up
        return down.weight, down.bias, up.weight, up.bias

    def forward(self, y_BSD: Tensor) -> Tensor:
        """z [B,S,D]."""
        return y_BSD + self.up(F.gelu(self.down(y_BSD), approximate="tanh"))


class AdapterProjection(nn.Module):
    """The frozen projection and the target adapter alone: the baseline without experts."""

    def __init__(self, site: LinearSite, adapter: AdapterConfig) -> None:
        super().__init__()
        self.weight = site.weight
        self.adapter = TargetAdapter(adapter, self.weight)

    def forward(self, x_BSF: Tensor) -> Tensor:
        """z = adapter(wo(x)), [B,S,D]."""
        return self.adapter(linear(x_BSF, self.weight))


class MixtureProjection(GatedLinear, AdapterProjection, ABC):
    """z = adapter(wo(x) + Σ_k g_k o_k); reports its gates and its task sparsity loss. Source: arXiv 2402.15082."""

    def __init__(
        self,
        site: LinearSite,
        sources: Sequence[ExpertSource],
        adapter: AdapterConfig,
        context: PassContext,
        *,
        gate: GateKind = "learned",
    ) -> None:
        super().__init__(site, adapter)
        self.add_gate(site, sources, context, gate)
        self.add_experts(site, sources)

    def forward(self, x_BSF: Tensor) -> Tensor:
        """z [B,S,D]; gates [B,K] and sparsity loss go to the pass's context, as it asks for them."""
        context = self.context
        if context.is_generating:
            if self.in_decoder:
                return self.adapter(self._generate_step(x_BSF))
            gates_BK = self._gates(x_BSF)
            context.record_generate_gates(gates_BK)
            return self.adapter(self.generate_step(x_BSF, self.prepare_step(gates_BK)))
        z_BSD, loss, gates_BK = self.mix(x_BSF, sparsity=context.wants_sparsity)
        if loss is not None:
            context.record(gates_BK, loss)
        return z_BSD

    @abstractmethod
    def add_experts(self, site: LinearSite, sources: Sequence[ExpertSource]) -> None:
        """Lay the experts of the sources, all of which are on the layer, side by side."""

    @property
    def token_weights_BS(self) -> Tensor | None:
        """What each token counts in this stack's sparsity losses; None where all count alike."""
        context = self.context
        return context.decoder_weights_BS if self.in_decoder else context.encoder_weights_BS

    @abstractmethod
    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B,S,D]; Σ_k mean_b(g_bk) · mean over tokens (1 − cos(z, o_k)), fp32, if wanted; gates [B,K], detached."""


class LoraMixture(LoraExperts, MixtureProjection):
    """LoRA experts; mixture, target adapter and sparsity loss are one op."""

    @property
    def external_parameters(self) -> tuple[Tensor, ...]:
        return *super().external_parameters, *self.adapter.tensors

    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        return self._mix(
            x_BSF,
            adapter=self.adapter.tensors,
            sparsity=sparsity,
            token_weights=self.token_weights_BS,
        )


class BottleneckMixture(MixtureProjection):
    """Bottleneck experts. Their residual is of full rank: each one's output [B,S,D] is made."""

    def add_experts(self, site: LinearSite, sources: Sequence[ExpertSource]) -> None:
        self.ranks = [source.rank for source in sources]
        self.down = packed(sources, f"{site.name}.down.weight", self.weight, dim=0)
        self.down_bias = packed(sources, f"{site.name}.down.bias", self.weight, dim=0)
        self.up = packed(sources, f"{site.name}.up.weight", self.weight, dim=1)
        self.up_bias = packed(sources, f"{site.name}.up.bias", self.weight, dim=0)
        self.ffn_input_BSD: Tensor | None = None

    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
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


def packed(sources: Sequence[ExpertSource], key: str, like: Tensor, *, dim: int) -> nn.Parameter:
    """One frozen tensor of all experts side by side."""
    tensors = [source.weights[key] for source in sources]
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return frozen(tuple(shape), partial(torch.cat, tensors, dim=dim), like=like)


MIXTURES: dict[str, type[LoraMixture] | type[BottleneckMixture]] = {
    "lora": LoraMixture,
    "bottleneck": BottleneckMixture,
}
