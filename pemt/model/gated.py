"""What every linear layer with experts shares: what its gate reads, and how it answers a token at a time.

Shapes: B batch, S tokens, F input width, D output width, K experts, C width of the gate's context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pemt.model.context import PassContext
from pemt.model.experts import ExpertSource
from pemt.model.gate import GateKind, make_gate
from pemt.model.inject import LinearSite
from pemt.ops import prompt_mean


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
        self._answered: tuple[Tensor, Any] | None = None

    def _gate_context(self, x_BSF: Tensor) -> tuple[Tensor, Tensor]:
        """x, and what its gates are computed from; see `prompt_mean`."""
        if not self.in_decoder:
            return prompt_mean(x_BSF, self.context.prompt_length)
        assert self.context.encoder_prompt_BD is not None, "the hook on the decoder has not run"
        return x_BSF, self.context.encoder_prompt_BD

    def _answer(self, x_BSF: Tensor) -> Tensor:
        """One step of `generate` in the decoder: y [B,S,D], with the gates of its first step."""
        _, prompt_BD = self._gate_context(x_BSF)
        if self._answered is None or self._answered[0] is not prompt_BD:
            gates_BK = self.gate(prompt_BD)
            self.context.record_answer(gates_BK)
            self._answered = prompt_BD, self.prepare_answer(gates_BK)
        return self.answer(x_BSF, self._answered[1])

    @abstractmethod
    def prepare_answer(self, gates_BK: Tensor) -> Any:
        """What `answer` needs of the gates; once for all steps of a `generate`."""

    @abstractmethod
    def answer(self, x_BSF: Tensor, prepared: Any) -> Tensor:
        """y [B,S,D], for one step after another with the same gates."""
