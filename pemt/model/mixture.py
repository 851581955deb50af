"""Stage 2: what replaces an FFN's output projection: frozen experts, a gate over them, a target adapter.

Shapes: B batch, S tokens, D d_model, F d_ff, K experts, R rank of one expert, N ranks of all experts together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource, ModelError, adapter_linear
from pemt.model.gate import Gate
from pemt.model.inject import FfnSite
from pemt.model.trainable import Trainable, frozen
from pemt.ops import expert_mixture, gram_matrix, task_sparsity


class TargetAdapter(Trainable):
    """z = y + up(gelu_new(down(y))), D → D // reduction_factor → D."""

    def __init__(self, d_model: int, *, reduction_factor: int, like: Tensor) -> None:
        super().__init__()
        if d_model < reduction_factor:
            raise ModelError(
                f"adapter.reduction_factor: found {reduction_factor}, at most d_model = {d_model} of this base model"
            )
        self.down = adapter_linear(d_model, d_model // reduction_factor, like)
        self.up = adapter_linear(d_model // reduction_factor, d_model, like)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()

    def forward(self, y_BSD: Tensor) -> Tensor:
        return y_BSD + self.up(F.gelu(self.down(y_BSD), approximate="tanh"))


class AdapterProjection(nn.Module):
    """The frozen projection and the target adapter alone: the baseline without experts."""

    def __init__(self, weight: nn.Parameter, adapter: TargetAdapter) -> None:
        super().__init__()
        self.weight = weight
        self.adapter = adapter

    def forward(self, x_BSF: Tensor) -> Tensor:
        return self.adapter(F.linear(x_BSF, self.weight))


class MixtureProjection(AdapterProjection):
    """Frozen projection + Σ_k g_k o_k, then the target adapter; also reports gates and the task sparsity loss."""

    def __init__(
        self,
        weight: nn.Parameter,
        adapter: TargetAdapter,
        gate: Gate,
        context: PassContext,
        *,
        in_decoder: bool,
    ) -> None:
        super().__init__(weight, adapter)
        self.gate = gate
        self.context = context
        self.in_decoder = in_decoder

    def forward(self, x_BSF: Tensor) -> Tensor:
        gates_BK = self.gate(self._gate_context(x_BSF))
        y_BSD, for_sparsity = self.mix(x_BSF, gates_BK)
        z_BSD = self.adapter(y_BSD)
        if self.context.wants_sparsity:
            mask_BS = (
                self.context.decoder_mask_BS if self.in_decoder else self.context.encoder_mask_BS
            )
            self.context.record(gates_BK, self.sparsity(z_BSD, for_sparsity, gates_BK, mask_BS))
        return z_BSD

    def _gate_context(self, x_BSF: Tensor) -> Tensor:
        if not self.in_decoder:
            return x_BSF[:, : self.context.prompt_length].float().mean(dim=1)
        assert self.context.encoder_prompt_BD is not None, (
            "the pre-hook on cross-attention has not run"
        )
        return self.context.encoder_prompt_BD

    def mix(self, x_BSF: Tensor, gates_BK: Tensor) -> tuple[Tensor, Any]:
        """(y [B,S,D], whatever `sparsity` needs of the experts)."""
        raise AssertionError("a mixture is of one kind of expert")

    def sparsity(
        self, z_BSD: Tensor, for_sparsity: Any, gates_BK: Tensor, mask_BS: Tensor | None
    ) -> Tensor:
        """Σ_k mean_b(g_bk) · mean over tokens (1 − cos(z, o_k)), a scalar (arXiv 2402.15082, section 3.4)."""
        raise AssertionError("a mixture is of one kind of expert")


class LoraMixture(MixtureProjection):
    """LoRA experts, packed side by side for `pemt.ops`; no expert's output is ever made."""

    def __init__(
        self, sources: Sequence[ExpertSource], site: FfnSite, weight: nn.Parameter, **parts: Any
    ) -> None:
        super().__init__(weight, **parts)
        self.ranks = [source.rank for source in sources]
        self.scales = [source.alpha / source.rank for source in sources]
        down_NF = torch.cat([source.weights[f"{site.name}.down"].to(weight) for source in sources])
        up_DN = torch.cat(
            [source.weights[f"{site.name}.up"].to(weight) for source in sources], dim=1
        )
        self.down = frozen(nn.Parameter(down_NF))
        self.up = frozen(nn.Parameter(up_DN))
        self.register_buffer("gram", gram_matrix(up_DN, self.ranks), persistent=False)

    def mix(self, x_BSF: Tensor, gates_BK: Tensor) -> tuple[Tensor, Tensor]:
        return expert_mixture(
            x_BSF, self.weight, self.down, self.up, gates_BK, self.scales, self.ranks
        )

    def sparsity(
        self, z_BSD: Tensor, for_sparsity: Tensor, gates_BK: Tensor, mask_BS: Tensor | None
    ) -> Tensor:
        return task_sparsity(
            z_BSD, for_sparsity, self.up, self.gram, gates_BK, self.scales, self.ranks, mask_BS
        )


class BottleneckMixture(MixtureProjection):
    """Bottleneck experts. Their residual has full rank, so their outputs are made, one [B,S,D] for each."""

    def __init__(
        self, sources: Sequence[ExpertSource], site: FfnSite, weight: nn.Parameter, **parts: Any
    ) -> None:
        super().__init__(weight, **parts)
        self.ranks = [source.rank for source in sources]
        self.ffn_input_BSD: Tensor | None = None

        def packed(name: str, dim: int) -> nn.Parameter:
            tensors = [source.weights[f"{site.name}.{name}"].to(weight) for source in sources]
            return frozen(nn.Parameter(torch.cat(tensors, dim=dim)))

        self.down = packed("down.weight", 0)
        self.down_bias = packed("down.bias", 0)
        self.up = packed("up.weight", 1)
        self.up_bias = packed("up.bias", 0)

    def mix(self, x_BSF: Tensor, gates_BK: Tensor) -> tuple[Tensor, list[Tensor]]:
        ffn_input_BSD, self.ffn_input_BSD = self.ffn_input_BSD, None
        assert ffn_input_BSD is not None, "the pre-hook on the FFN has not run"
        latent_BSN = F.gelu(F.linear(x_BSF, self.down, self.down_bias), approximate="tanh")
        y_BSD = F.linear(x_BSF, self.weight)
        outputs = []
        parts = zip(
            latent_BSN.split(self.ranks, dim=-1),
            self.up.split(self.ranks, dim=1),
            self.up_bias.chunk(len(self.ranks)),
            gates_BK.to(y_BSD.dtype).unbind(dim=1),
            strict=True,
        )
        for latent_BSR, up_DR, up_bias_D, gate_B in parts:
            output_BSD = F.linear(latent_BSR, up_DR, up_bias_D) + ffn_input_BSD.to(y_BSD.dtype)
            y_BSD = y_BSD + gate_B[:, None, None] * output_BSD
            outputs.append(output_BSD)
        return y_BSD, outputs

    def sparsity(
        self, z_BSD: Tensor, for_sparsity: list[Tensor], gates_BK: Tensor, mask_BS: Tensor | None
    ) -> Tensor:
        weights_K = gates_BK.float().mean(dim=0)
        mask_BS = (
            torch.ones_like(z_BSD[..., 0], dtype=torch.float32)
            if mask_BS is None
            else mask_BS.float()
        )
        loss = weights_K.new_zeros(())
        for weight, output_BSD in zip(weights_K, for_sparsity, strict=True):
            distance_BS = 1 - F.cosine_similarity(z_BSD.float(), output_BSD.float(), dim=-1)
            loss = loss + weight * (distance_BS * mask_BS).sum() / mask_BS.sum().clamp(min=1)
        return loss


MIXTURES: dict[str, type[LoraMixture] | type[BottleneckMixture]] = {
    "lora": LoraMixture,
    "bottleneck": BottleneckMixture,
}
