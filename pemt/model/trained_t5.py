"""What the training loop needs of a model, whichever method trains it.

Shapes: B batch, S source tokens, P prompt tokens, T target tokens, V vocabulary, D d_model, C labels,
L sites with a gate, K experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from pemt.model.attention import share_sums
from pemt.model.decoding import fast_generate
from pemt.model.families import STACKS, family_of
from pemt.model.inject import Base, blocks_of, stack_of
from pemt.model.shape import base_shape

IGNORED_LABEL = -100


@dataclass
class PemtOutput(ModelOutput):
    """What a training step or a measurement reads.

    Args:
        loss: what is trained on, fp32: `ce_loss`, with experts + weight · `sparsity_loss`.
        ce_loss: mean cross-entropy over the labels that are not -100, fp32; 0 where all are.
        sparsity_loss: mean task sparsity loss over the FFNs that mix experts, fp32; None where none do.
        logits: [B,T,V].
        encoder_last_hidden_state: [B,P+S,D].
        gates_BLK: every example's gates in the order of `gate_sites`, 0 for a source that has no expert there, fp32,
            detached; None where no gates are.
    """

    loss: Tensor | None = None
    ce_loss: Tensor | None = None
    sparsity_loss: Tensor | None = None
    logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    gates_BLK: Tensor | None = None


class TrainedT5(nn.Module, ABC):
    """A base model of which a method trains a part, or all.

    A subclass changes the base model in place, then calls `freeze_untrained`. Without gates and a loss beside the
    cross-entropy it need not change what is computed here.

    Attributes:
        gate_sites: the places with a gate, in the order of the gates, and the sources that each weighs. An FFN's is
            named `encoder/0` or `decoder/0`, that of another linear layer `encoder/0/self/q`.
        sparsity_loss_weight: how much of `sparsity_loss` is in a pass's `loss`; 0 where no experts are mixed.
    """

    base: Base

    def __init__(self) -> None:
        super().__init__()
        self.gate_sites: dict[str, list[str]] = {}
        self.sparsity_loss_weight = 0.0

    @property
    def called(self) -> Any:
        """What takes the base model's arguments."""
        return self.base

    def encoder_inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """What the encoder reads, as the base model's arguments."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PemtOutput:
        """One pass with teacher forcing.

        Args:
            input_ids, attention_mask: [B,S], padded on the right.
            labels: [B,T], -100 where there is nothing to predict.
        """
        out = self.called(
            **self.encoder_inputs(input_ids, attention_mask),
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

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, **generation_kwargs: Any
    ) -> Tensor:
        """Token ids [B,T] (times `num_return_sequences`) from the base model's own `generate`."""
        return self.generate_with_gates(input_ids, attention_mask, **generation_kwargs)[0]

    @torch.no_grad()
    def generate_with_gates(
        self, input_ids: Tensor, attention_mask: Tensor, **generation_kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What `generate` gives, and the gates [B,L,K], fp32, of that same pass; None where none are."""
        inputs = self.encoder_inputs(input_ids, attention_mask)
        given = {**self.generation_cache(), **generation_kwargs}
        with fast_generate(self.base):
            return self.called.generate(**inputs, **given), None

    @torch.no_grad()
    def label_log_likelihoods(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """The log-likelihood of each label as the answer [B,C], fp32, from one pass of the encoder; and gates [B,L,K].

        Args:
            input_ids, attention_mask: as of `forward`.
            labels: token ids of each, with the end of sequence.
        """
        inputs = self.encoder_inputs(input_ids, attention_mask)
        base: Any = self.base  # the union of the families has no common type
        with fast_generate(base):
            states = stack_of(base, "encoder")(**inputs)

            def logits_of(targets_BT: Tensor) -> Tensor:
                return base(
                    encoder_outputs=states,
                    attention_mask=inputs["attention_mask"],
                    decoder_input_ids=base.prepare_decoder_input_ids_from_labels(targets_BT),
                    use_cache=False,
                ).logits

            return log_likelihoods(logits_of, labels, input_ids), None

    @abstractmethod
    def declared_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained, in any order; a parameter may come twice."""

    def prompt_similarity(self) -> Tensor | None:
        """Cosines [M,M] between the mean prompts of the target, first, and of M - 1 sources.

        Of the last pass in evaluation; None where there are no source prompts.
        """
        return None

    def freeze_untrained(self) -> None:
        """Freeze everything that is not declared; once, before an engine sees the model.

        Of what is frozen, T5's position bias is added to the masks once for all layers of a stack.
        """
        trained = {id(parameter) for parameter in self.declared_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        share_sums(self.base)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained, in the order and under the names of `named_parameters`."""
        trained = {id(parameter) for parameter in self.declared_parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) in trained:
                yield name, parameter

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass instead of keeping its activations.

        Not reentrant: the sparsity losses are no outputs of the blocks, and that way would cut
        them off from their gradients.
        """
        options = {"use_reentrant": False}
        if hasattr(self.base, "activation_checkpointing_enable"):
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:  # transformers 5.17 has it under the older name alone, of which later ones warn
            self.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

    def compile_blocks(self) -> None:
        """Compile every block in place (torch.compile); their names and parameters stay.

        Sizes are left open, since batches differ in width. A block that mixes experts is a program of its own, in
        training and in evaluation: beyond torch's limit, 8 for all, the others would run uncompiled.
        """
        blocks = [block for stack in STACKS for block in blocks_of(self.base, stack)]
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 8 * len(blocks))
        limits.accumulated_recompile_limit = max(
            limits.accumulated_recompile_limit, limits.recompile_limit
        )
        for block in blocks:
            block.compile(dynamic=True)

    def generation_cache(self) -> dict[str, Any]:
        """Keyword arguments that `generate` of this base model needs, if any."""
        shape = base_shape(self.base.config)
        deep_enough = shape["num_decoder_layers"] == shape["num_layers"]
        if deep_enough or not family_of(shape).cache_as_deep_as_encoder:
            return {}
        # transformers 5.23 gives its own cache the depth of the encoder; this one grows
        return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


def mean_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean over the labels that are not -100, in fp32; 0 where all are."""
    summed = F.cross_entropy(
        logits_BTV.float().flatten(0, 1),
        labels_BT.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )
    return summed / (labels_BT != IGNORED_LABEL).sum().clamp(min=1)


def log_likelihoods(
    logits_of: Callable[[Tensor], Tensor], labels: Sequence[Sequence[int]], like_B: Tensor
) -> Tensor:
    """Summed log-probabilities of the tokens of each label, its end of sequence included [B,C], in fp32.

    Not their mean: it is the probability that the model writes just this label and ends there.

    Args:
        logits_of: the decoder's logits [B,T,V] with these targets [B,T].
        labels: token ids of each label.
        like_B: any tensor of the batch, for its size and device.
    """
    columns = []
    for ids in labels:
        targets_BT = torch.tensor(ids, device=like_B.device).expand(len(like_B), -1)
        logs_BTV = logits_of(targets_BT).float().log_softmax(dim=-1)
        columns.append(logs_BTV.gather(-1, targets_BT[..., None]).squeeze(-1).sum(dim=1))
    return torch.stack(columns, dim=1)
