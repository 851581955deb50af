"""Finds the places in a stock base model where PEMT's modules go, as its row in `families` names them.

Shapes: B batch, S tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    T5GemmaForConditionalGeneration,
    UMT5ForConditionalGeneration,
)

from pemt.model.context import PassContext
from pemt.model.experts import ModelError
from pemt.model.families import FAMILIES, STACKS
from pemt.model.shape import base_shape, decoder_start
from pemt.model.sites import Site, sites_of

Base: TypeAlias = (
    T5ForConditionalGeneration
    | MT5ForConditionalGeneration
    | UMT5ForConditionalGeneration
    | T5GemmaForConditionalGeneration
)


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of a base model, which can be replaced.

    Args:
        spec: which, by name.
        base: the base model that it is in.
    """

    spec: Site
    base: PreTrainedModel

    @property
    def name(self) -> str:
        """As the experts' tensors begin: see `Site`."""
        return self.spec.name

    @property
    def module(self) -> Any:
        """What stands there now."""
        return self.base.get_submodule(self.spec.module)

    @property
    def weight(self) -> nn.Parameter:
        """The weight [outputs, inputs] of the base model's own layer."""
        assert isinstance(self.module, nn.Linear), f"{self.name}: has been replaced before"
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def replace(self, module: nn.Module) -> None:
        """Put a module in the layer's place; T5 reads `wo.weight.dtype`, so it must have a `weight`."""
        assert isinstance(module.weight, nn.Parameter)
        self.base.set_submodule(self.spec.module, module)

    def pass_ffn_input(self) -> None:
        """Hand the FFN's layer-normed input [B,S,D] to the module in its output projection's place.

        The hook runs inside the block, hence again when checkpointing recomputes it.
        """
        ffn, _, output = self.spec.module.rpartition(".")

        def keep_ffn_input(module: Any, args: tuple[Tensor, ...]) -> None:
            getattr(module, output).ffn_input_BSD = args[0]

        self.base.get_submodule(ffn).register_forward_pre_hook(keep_ffn_input)


def checked_base(base: PreTrainedModel) -> Base:
    """The base model, if it is one that PEMT can be put into; its decoder is made causal where it is not.

    Raises:
        ModelError: it is no stock model of a family with a language-model head, its decoder has no start, or its
            linear layers have biases.
    """
    if not isinstance(base, Base):
        *others, last = (family.title for family in FAMILIES.values())
        raise ModelError(
            f"model_name_or_path: found a {type(base).__name__}, "
            f"allowed are {', '.join(others)} and {last} for conditional generation"
        )
    family = FAMILIES[base.config.model_type]
    if decoder_start(base.config) is None:
        raise ModelError(
            f"model_name_or_path: its config.json has no {family.decoder_start}; "
            "set it to what the decoder was trained to start from, for T5 the pad id"
        )
    for stack in STACKS:
        if getattr(getattr(base.config, stack, None), "attention_bias", False):
            raise ModelError(
                f"model_name_or_path: its config.json has {stack}.attention_bias true; allowed are base models whose "
                "attentions have no biases"
            )
    for module in base.modules():
        _keep_buffers_exact(module)
    attention = family.parts["decoder"]["self"].module
    for block in blocks_of(base, "decoder"):
        # transformers 5.17 forgets it for UMT5, whose decoder then reads the very tokens that it is to predict.
        block.get_submodule(attention).is_causal = True
    return base


def _keep_buffers_exact(module: nn.Module) -> None:
    """Leave a rotary embedding's frequencies in fp32 when the model is cast, as DeepSpeed does.

    In bf16 the angle of position 500 is wrong by up to a radian.
    """
    if next(module.buffers(recurse=False), None) is not None:
        vars(module)["_apply"] = MethodType(_apply_but_for_dtype, module)


def _apply_but_for_dtype(module: nn.Module, fn: Callable[..., Any], *args: Any) -> nn.Module:
    """`nn.Module._apply`, which `to` and `bfloat16` call for every module."""
    exact = dict(module.named_buffers(recurse=False))
    nn.Module._apply(module, fn, *args)
    for name, buffer in exact.items():
        moved = module.get_buffer(name)
        if moved.dtype != buffer.dtype:
            module.register_buffer(name, buffer.to(moved.device), persistent=False)
    return module


def stack_of(base: Base, stack: str) -> Any:
    """The encoder or the decoder."""
    return base.get_submodule(FAMILIES[base.config.model_type].stacks[stack])


def blocks_of(base: Base, stack: str) -> Any:
    """A stack's blocks, from the first."""
    return stack_of(base, stack).get_submodule(FAMILIES[base.config.model_type].blocks)


def linear_sites(base: Base) -> list[LinearSite]:
    """Every linear layer that an expert can be on, in the order of `sites_of`."""
    return [LinearSite(site, base) for site in sites_of(base_shape(base.config))]


def layer_norms(base: Base) -> dict[str, nn.Module]:
    """Every layer norm by its name, final ones included."""
    final = FAMILIES[base.config.model_type].final_norm
    kind = type(stack_of(base, "encoder").get_submodule(final))
    return {name: module for name, module in base.named_modules() if isinstance(module, kind)}


def pass_encoder_prompt(base: Base, context: PassContext) -> None:
    """Before every pass of the decoder, put the mean of the encoder's states at the prompt in the context."""
    stack_of(base, "decoder").register_forward_pre_hook(
        lambda module, args, kwargs: context.keep_encoder_prompt(kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )


def keep_for_recompute(base: Base, context: PassContext) -> None:
    """Let activation checkpointing recompute a decoder's block with what its gates have read in the pass itself."""

    def checkpointed(
        checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any
    ) -> Any:
        own_BD = context.encoder_prompt_BD

        def run(*args: Any) -> Any:
            newer_BD, context.encoder_prompt_BD = context.encoder_prompt_BD, own_BD
            try:
                return function(*args)
            finally:
                context.encoder_prompt_BD = newer_BD

        return checkpoint(run, *args)

    # A compiled program may carry nothing out of what is recomputed, and gates report: so these blocks run as written.
    as_written: Any = torch.compiler.disable(checkpointed)
    for block in blocks_of(base, "decoder"):
        # transformers' own, which gives no other way in
        checkpoint = block._gradient_checkpointing_func
        block._gradient_checkpointing_func = partial(as_written, checkpoint)
