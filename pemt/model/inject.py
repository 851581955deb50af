"""Finds, by type, the places in a stock T5, mT5 or UMT5 where PEMT's modules go.

Shapes: B batch, S tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from pemt.model.context import PassContext
from pemt.model.experts import ModelError
from pemt.model.shape import base_shape
from pemt.model.sites import Site, sites_of

Base: TypeAlias = (
    T5ForConditionalGeneration | MT5ForConditionalGeneration | UMT5ForConditionalGeneration
)
LAYER_NORMS = (T5LayerNorm, MT5LayerNorm, UMT5LayerNorm)
# the keyword under which a decoder is handed the encoder's states
ENCODER_STATES = "encoder_hidden_states"


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of a base model, which can be replaced.

    Args:
        site: which.
        owner: the attention or FFN that has it as a child.
        d_model: the base model's.
    """

    site: Site
    owner: Any
    d_model: int

    @property
    def name(self) -> str:
        """As the experts' tensors begin: see `Site`."""
        return self.site.name

    @property
    def in_decoder(self) -> bool:
        """Whether it is one of the decoder's."""
        return self.site.in_decoder

    @property
    def module(self) -> Any:
        """What stands there now."""
        return getattr(self.owner, self.site.projection)

    @property
    def weight(self) -> nn.Parameter:
        """The weight [outputs, inputs] of the base model's own layer."""
        assert isinstance(self.module, nn.Linear), f"{self.name}: has been replaced before"
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def gate_width(self) -> int:
        """Of what the site's gate reads: its input in the encoder, the encoder's states in the decoder."""
        return self.d_model if self.in_decoder else self.weight.shape[1]

    def replace(self, module: nn.Module) -> None:
        """Put a module in the layer's place; T5 reads `wo.weight.dtype`, so it must have a `weight`."""
        assert isinstance(module.weight, nn.Parameter)
        setattr(self.owner, self.site.projection, module)

    def pass_ffn_input(self) -> None:
        """Hand the FFN's layer-normed input [B,S,D] to the module in `wo`'s place.

        The hook runs inside the block, hence again when checkpointing recomputes it.
        """
        self.owner.register_forward_pre_hook(_keep_ffn_input)


def _keep_ffn_input(dense: Any, args: tuple[Tensor, ...]) -> None:
    dense.wo.ffn_input_BSD = args[0]


def checked_base(base: PreTrainedModel) -> Base:
    """The base model, if it is one that PEMT can be put into; its decoder is made causal where it is not.

    Raises:
        ModelError: it is no stock T5, mT5 or UMT5 with a language-model head.
    """
    if not isinstance(base, Base):
        raise ModelError(
            f"model_name_or_path: found a {type(base).__name__}, "
            "allowed are T5, mT5 and UMT5 for conditional generation"
        )
    if getattr(base.config, "decoder_start_token_id", None) is None:
        raise ModelError(
            "model_name_or_path: its config.json has no decoder_start_token_id; "
            "set it to what the decoder was trained to start from, for T5 the pad id"
        )
    blocks: Any = base.decoder.block
    for block in blocks:
        # transformers 5.17 forgets it for UMT5, whose decoder then reads the very tokens that it is to predict.
        block.layer[0].SelfAttention.is_causal = True
    return base


def linear_sites(base: Base) -> list[LinearSite]:
    """Every linear layer that an expert can be on, in the order of `sites_of`."""
    return [
        LinearSite(site, base.get_submodule(site.module.rpartition(".")[0]), base.config.d_model)
        for site in sites_of(base_shape(base.config))
    ]


def layer_norms(base: Base) -> Iterator[nn.Module]:
    """Every T5 layer norm, final ones included."""
    return (module for module in base.modules() if isinstance(module, LAYER_NORMS))


def pass_encoder_prompt(base: Base, context: PassContext) -> None:
    """Before every pass of the decoder, put the mean of the encoder's states at the prompt in the context."""

    def keep_prompt_mean(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        states_BSD = context.keep_encoder_prompt(kwargs[ENCODER_STATES])
        return args, {**kwargs, ENCODER_STATES: states_BSD}

    base.decoder.register_forward_pre_hook(keep_prompt_mean, with_kwargs=True)


def keep_for_recompute(base: Base, context: PassContext) -> None:
    """Let activation checkpointing recompute a decoder's block with what its gates have read in the pass itself."""
    blocks: Any = base.decoder.block
    for block in blocks:
        # transformers' own, which gives no other way in
        checkpoint = block._gradient_checkpointing_func
        block._gradient_checkpointing_func = partial(_checkpointed, context, checkpoint)


def _checkpointed(
    context: PassContext, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any
) -> Any:
    if torch.compiler.is_compiling():  # into a program that has what gates read among its inputs
        return checkpoint(function, *args)
    return checkpoint(partial(_seeing, context, context.encoder_prompt_BD, function), *args)


def _seeing(
    context: PassContext, prompt_BD: Tensor | None, function: Callable[..., Any], *args: Any
) -> Any:
    with context.seeing(prompt_BD):
        return function(*args)
