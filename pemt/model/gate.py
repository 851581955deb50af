"""The gate of one FFN: one weight per sample and source expert.

Shapes: B batch, C width of the gate's context, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pemt.model.trainable import Trainable


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
        """Gates [B,K] in fp32, under autocast too: bf16 would round small preferences away."""
        with torch.autocast(context_BC.device.type, enabled=False):
            return torch.softmax(context_BC.float() @ self.weight.float(), dim=-1)
