"""The gate of one FFN: one weight per sample and source expert (arXiv 2402.15082, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pemt.model.trainable import Trainable


class Gate(Trainable):
    """softmax(c · W_g) over K experts, W_g [C,K] zero at the start, so that training starts from equal weights."""

    def __init__(
        self, width: int, experts: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, experts, dtype=dtype, device=device))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield self.weight

    def forward(self, context_BC: Tensor) -> Tensor:
        """Gates [B,K] in fp32 whatever the model's dtype or autocast: bf16 would round small preferences away."""
        with torch.autocast(context_BC.device.type, enabled=False):
            return torch.softmax(context_BC.float() @ self.weight.float(), dim=-1)
