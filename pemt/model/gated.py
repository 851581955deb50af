"""Stage 2, in the place of a frozen linear layer: what every kind of experts shares, the gate and the target adapter.

Shapes: B batch, S tokens, F input width, D output width, K experts, H the adapter's inner width, C width of the
gate's context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pemt.config import AdapterConfig
from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource, ModelError, Trainable, adapter_linear
from pemt.model.inject import LinearSite
from pemt.model.shape import base_shape
from pemt.ops import prompt_mean, reference


class Gate(Trainable):
    """softmax(c · W_g), W_g [C,K] zero at the start: training begins with equal weights.

    `like` gives dtype and device. Source: arXiv 2402.15082.
    """

    def __init__(self, width: int, experts: int, *, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(width, experts))

    def forward(self, context_BC: Tensor) -> Tensor:
        """Gates [B,K], in fp32."""
        return reference.gates(context_BC, self.weight)


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

    def forward(self, y_BSD: Tensor) -> Tensor:
        """z [B,S,D]."""
        return y_BSD + self.up(F.gelu(self.down(y_BSD), approximate="tanh"))


class GatedLinear(nn.Module, ABC):
    """y = W x + Σ_k g_k o_k over the experts on a layer; at an FFN's output z = adapter(y), with a task sparsity loss.

    The gate's context is the layer's input in the encoder and the encoder's last state in the decoder,
    each as its mean over the prompt. Source: arXiv 2402.15082, for the FFNs' output projections.

    Args:
        site: still with the base model's own layer.
        sources: those that are on the layer.
        context: of the pass; gates and loss go there, as it asks for them.
        gate: see `MixtureConfig.gate`.
        adapter: at an FFN's output.
    """

    def __init__(
        self,
        site: LinearSite,
        sources: Sequence[ExpertSource],
        context: PassContext,
        *,
        gate: str,
        adapter: AdapterConfig | None = None,
    ) -> None:
        super().__init__()
        self.weight = site.weight
        self.adapter = None if adapter is None else TargetAdapter(adapter, self.weight)
        self.in_decoder = site.spec.in_decoder
        # of what the gate reads: the encoder's states, or the layer's input
        width = base_shape(site.base.config)["d_model"] if self.in_decoder else self.weight.shape[1]
        learned = gate == "learned"
        self.gate = Gate(width, len(sources), like=self.weight) if learned else None
        self.source_names = [source.name for source in sources]
        self.context = context
        self._prepared: tuple[Tensor | int, Any] | None = None
        self.add_experts(site, sources)

    def forward(self, x_BSF: Tensor) -> Tensor:
        """z [B,S,D] of the layer's input."""
        context, adapter = self.context, self.adapter
        if context.is_generating and self.in_decoder:
            y_BSD = self._generate_step(x_BSF)
            return y_BSD if adapter is None else adapter(y_BSD)
        if context.is_generating and adapter is not None:
            gates_BK = self._gates(x_BSF)
            context.record(gates_BK)
            return adapter(self.generate_step(x_BSF, self.prepare_step(gates_BK)))
        wanted = adapter is not None and context.wants_sparsity
        z_BSD, loss, gates_BK = self.mix(x_BSF, sparsity=wanted)
        context.record(gates_BK, loss)
        return z_BSD

    @property
    def adapter_tensors(self) -> tuple[Tensor, ...]:
        """The target adapter as `pemt.ops` takes it: down [H,D], its bias [H], up [D,H], its bias [D]; or nothing."""
        if self.adapter is None:
            return ()
        down, up = self.adapter.down, self.adapter.up
        return down.weight, down.bias, up.weight, up.bias

    @property
    def token_weights_BS(self) -> Tensor | None:
        """What each token counts in this stack's sparsity losses; None where all count alike."""
        context = self.context
        return context.decoder_weights_BS if self.in_decoder else context.encoder_weights_BS

    @property
    def _gate_context(self) -> Tensor | int:
        """What the gate reads, as `pemt.ops.gated_output` takes it."""
        if not self.in_decoder:
            return self.context.prompt_length
        assert self.context.encoder_prompt_BD is not None, "the hook on the decoder has not run"
        return self.context.encoder_prompt_BD

    def _gates(self, x_BSF: Tensor) -> Tensor:
        """The gates [B,K] of an input, in fp32."""
        if self.gate is None:
            shape = (len(x_BSF), len(self.source_names))
            return x_BSF.new_full(shape, 1 / len(self.source_names), dtype=torch.float32)
        context = self._gate_context
        return self.gate(prompt_mean(x_BSF, context) if isinstance(context, int) else context)

    def _generate_step(self, x_BSF: Tensor) -> Tensor:
        """One step of `generate` in the decoder: y [B,S,D], with the gates of its first step."""
        prompt_BD = self._gate_context
        if self._prepared is None or self._prepared[0] is not prompt_BD:
            gates_BK = self._gates(x_BSF)
            self.context.record(gates_BK)
            self._prepared = prompt_BD, self.prepare_step(gates_BK)
        return self.generate_step(x_BSF, self._prepared[1])

    @abstractmethod
    def add_experts(self, site: LinearSite, sources: Sequence[ExpertSource]) -> None:
        """Lay the experts of the sources side by side."""

    @abstractmethod
    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B,S,D]; Σ_k mean_b(g_bk) · mean over tokens (1 − cos(z, o_k)), fp32, if wanted; gates [B,K], detached."""

    @abstractmethod
    def prepare_step(self, gates_BK: Tensor) -> Any:
        """What `generate_step` needs of the gates; once for all steps of a `generate`."""

    @abstractmethod
    def generate_step(self, x_BSF: Tensor, prepared: Any) -> Tensor:
        """y [B,S,D], for one step after another with the same gates."""
