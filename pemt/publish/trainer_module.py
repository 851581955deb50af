"""A PEMT model with the face of a T5, for other people's training loops.

Shapes: B batch, S source tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import Seq2SeqLMOutput

from pemt.model import PemtT5
from pemt.tasks import Task

INNER = "pemt."  # the model's name within the module


class PemtModule(nn.Module, ABC):
    """A PEMT model as a T5 for training: `forward`, `generate` and `config` are T5's, the rest of T5 is frozen.

    Only trained parameters require gradients, and they alone are in `state_dict`: a trainer's checkpoints are small,
    and load into a model that was made in the same way. The loss is what `pemt adapt` trains on: `pemt(...)`, the
    TrainedT5 inside, tells its parts.

    Args:
        pemt: the model.
        base_name: hub id or folder of the base model.
        tokenizer: as the model's prompt was made.
        description: the sentence that started the prompt.
        task: what it is to learn, where one was named.
    """

    # the loss is a mean over the batch: Trainer divides by the accumulation
    accepts_loss_kwargs = False
    main_input_name = "input_ids"

    def __init__(
        self,
        pemt: PemtT5,
        *,
        base_name: str,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
        task: Task | None,
    ) -> None:
        super().__init__()
        self.pemt, self.base_name, self.tokenizer = pemt, base_name, tokenizer
        self.description, self.task = description, task
        self._trained = {f"{INNER}{name}" for name, _ in pemt.trainable_parameters()}
        self.register_state_dict_post_hook(_keep_trained)
        self.register_load_state_dict_post_hook(_frozen_are_not_missing)
        self.train()  # all of it: the base model comes in evaluation mode, in which Lightning would leave it

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqLMOutput | tuple[Tensor, ...]:
        """One pass with teacher forcing, as T5's.

        Args:
            input_ids: [B,S], padded on the right.
            attention_mask: [B,S]; default: everything counts.
            decoder_input_ids: [B,T]; default: the labels, moved to the right.
            labels: [B,T], -100 where there is nothing to predict; without them there is no loss.
            return_dict: false gives a tuple.

        Returns:
            `loss`, `logits` [B,T,V] and `encoder_last_hidden_state`, whose first positions are the prompt's.

        Raises:
            ValueError: neither labels nor decoder_input_ids.
        """
        if labels is None and decoder_input_ids is None:
            raise ValueError(
                "give labels, or decoder_input_ids; a trainer's own label smoothing takes the labels away, and the "
                "sparsity loss with them: leave it off"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        out = self.pemt(input_ids, attention_mask, labels, decoder_input_ids)
        found = Seq2SeqLMOutput(
            loss=out.loss,
            logits=out.logits,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
        )
        return found.to_tuple() if return_dict is False else found

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Token ids [B,T] from the base model's own `generate`; labels, which trainers hand over, are not looked at."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.pemt.generate(input_ids, attention_mask, **generation_kwargs)

    @property
    def config(self) -> PreTrainedConfig:
        """The base model's."""
        return self.pemt.base.config

    @property
    def generation_config(self) -> GenerationConfig:
        """What `generate` goes by."""
        found: GenerationConfig = self.pemt.base.generation_config
        return found

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.pemt.base.generation_config = value

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pemt.base.device

    def can_generate(self) -> bool:
        """As trainers ask."""
        return True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Recompute every block in the backward pass; not reentrant, whatever is asked for: see TrainedT5."""
        self.pemt.enable_gradient_checkpointing()

    @abstractmethod
    def save_pretrained(
        self, save_directory: str | Path, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write what was trained, and what goes with it beside the base model.

        Args:
            save_directory: made if it does not exist.
            state_dict: the trained tensors, where they are not in the model (ZeRO-3); default: the model's own.
        """

    def _state(self, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The trained tensors by their names in the model inside."""
        given = self.state_dict() if state_dict is None else state_dict
        return {
            key.removeprefix(INNER): each for key, each in given.items() if key in self._trained
        }


def _keep_trained(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The base model, the experts and their prompts come from where they came from."""
    for key in [key for key in state if key.startswith(prefix)]:
        if key.removeprefix(prefix) not in module._trained:
            del state[key]


def _frozen_are_not_missing(module: Any, found: Any) -> None:
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers()]
    frozen = [name for name in names if name not in module._trained]
    # The module may be a part of another, whose other parts may well be missing.
    inner = tuple(f".{name}" for name in frozen)
    found.missing_keys[:] = [
        key for key in found.missing_keys if key not in frozen and not key.endswith(inner)
    ]
