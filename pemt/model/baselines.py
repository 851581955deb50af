"""The baselines that need nothing but the base model: full fine-tuning, and BitFit.

Shapes: B batch, S tokens, D d_model, T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pemt.model.decoding import fast_generate
from pemt.model.inject import Base, checked_base, layer_norms, stack_of
from pemt.model.likelihood import decoder_of, log_likelihoods
from pemt.model.trainable import Trainable
from pemt.model.trained_t5 import PemtOutput, TrainedT5, mean_cross_entropy


class BaselineT5(TrainedT5):
    """A T5 without experts and gates: the loss is the cross-entropy alone."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = checked_base(base)

    @property
    def called(self) -> Any:
        """What takes T5's arguments."""
        return self.base

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PemtOutput:
        out = self.called(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=self.base.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
        ce_loss = mean_cross_entropy(out.logits, labels)
        return PemtOutput(
            loss=ce_loss,
            ce_loss=ce_loss,
            logits=out.logits,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
        )

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, **generation_kwargs: Any
    ) -> Tensor:
        given = {**self.generation_cache(), **generation_kwargs}
        with fast_generate(self.base):
            return self.called.generate(input_ids=input_ids, attention_mask=attention_mask, **given)

    @torch.no_grad()
    def label_log_likelihoods(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        with fast_generate(self.base):
            encoder = stack_of(self.base, "encoder")
            states = encoder(input_ids=input_ids, attention_mask=attention_mask)
            decoder = decoder_of(self.base, states, attention_mask)
            return log_likelihoods(decoder, labels, input_ids), None


class FullT5(BaselineT5):
    """Full fine-tuning: every parameter is trained, tied ones once."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
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


class BitFitT5(BaselineT5):
    """BitFit: biases alone are trained.

    T5 has none, so zeros are put into every linear layer (the head's included) and onto every
    layer norm, as the published comparisons' code does: 282,496 parameters in t5-base, their "280K".
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        _put_biases(self.base)
        self.freeze_untrained()

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                yield module.bias
            elif isinstance(module, Trainable):
                yield from module.trainable_parameters()


def _put_biases(base: Base) -> None:
    for module in base.modules():
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    for name, norm in layer_norms(base).items():
        base.set_submodule(name, BiasedNorm(norm))
