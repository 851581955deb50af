"""The baselines that need nothing but the base model: full fine-tuning, and BitFit.

Shapes: B batch, S tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pemt.model.experts import Trainable
from pemt.model.inject import checked_base, layer_norms
from pemt.model.trained_t5 import TrainedT5


class FullT5(TrainedT5):
    """Full fine-tuning: every parameter is trained, tied ones once."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = checked_base(base)
        self.freeze_untrained()

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.parameters()


class BiasedNorm(Trainable):
    """A frozen T5 layer norm, which has no bias, and a trained one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        (weight_D,) = norm.parameters()
        self.bias = nn.Parameter(torch.zeros_like(weight_D))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        yield self.bias

    def forward(self, x_BSD: Tensor) -> Tensor:
        """norm(x) + bias, [B,S,D]."""
        return self.norm(x_BSD) + self.bias


class BitFitT5(TrainedT5):
    """BitFit: biases alone are trained.

    T5 has none, so zeros are put into every linear layer (the head's included) and onto every
    layer norm, as the published comparisons' code does: 282,496 parameters in t5-base, their "280K".
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = checked_base(base)
        for module in self.base.modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
        for name, norm in layer_norms(self.base).items():
            self.base.set_submodule(name, BiasedNorm(norm))
        self.freeze_untrained()

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                yield module.bias
            elif isinstance(module, Trainable):
                yield from module.trainable_parameters()
