"""The gate of one site: one weight per sample and source expert.

Shapes: B batch, C width of the gate's context, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from pemt.model.trainable import Trainable
from pemt.ops import reference

GateKind = Literal["learned", "uniform"]


def make_gate(kind: GateKind, width: int, experts: int, *, like: Tensor) -> Gate | UniformGate:
    """A gate over K experts that reads a context of this width: see `MixtureConfig.gate`."""
    return UniformGate(experts) if kind == "uniform" else Gate(width, experts, like=like)


class Gate(Trainable):
    """softmax(c · W_g), W_g [C,K] zero at the start: training begins with equal weights.

    `like` gives dtype and device. Source: arXiv 2402.15082.
    """

    def __init__(self, width: int, experts: int, *, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(width, experts, dtype=like.dtype, device=like.device)
        )

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield self.weight

    def forward(self, context_BC: Tensor) -> Tensor:
        """Gates [B,K], in fp32."""
        return reference.gates(context_BC, self.weight)


class UniformGate(nn.Module):
    """1 / K for every expert, whatever the context: nothing is trained."""

    weight = None

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, context_BC: Tensor) -> Tensor:
        """Gates [B,K] in fp32."""
        shape = (len(context_BC), self.experts)
        return context_BC.new_full(shape, 1 / self.experts, dtype=torch.float32)
