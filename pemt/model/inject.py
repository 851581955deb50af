"""Finds, by type, the places in a stock T5, mT5 or UMT5 where PEMT's modules go, and puts them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import (
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.models.mt5.modeling_mt5 import MT5LayerCrossAttention, MT5LayerFF, MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5LayerNorm
from transformers.models.umt5.modeling_umt5 import (
    UMT5LayerCrossAttention,
    UMT5LayerFF,
    UMT5LayerNorm,
)

from pemt.model.context import PassContext
from pemt.model.experts import STACKS, ModelError

BASES = (T5ForConditionalGeneration, MT5ForConditionalGeneration, UMT5ForConditionalGeneration)
FFNS = (T5LayerFF, MT5LayerFF, UMT5LayerFF)
CROSS_ATTENTIONS = (T5LayerCrossAttention, MT5LayerCrossAttention, UMT5LayerCrossAttention)
LAYER_NORMS = (T5LayerNorm, MT5LayerNorm, UMT5LayerNorm)


@dataclass(frozen=True)
class FfnSite:
    """One FFN of the base model; `dense` is its DenseReluDense, whose child `wo` is replaced."""

    stack: str
    layer: int
    dense: nn.Module

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}"


def check_base(base: PreTrainedModel) -> None:
    """Raise `ModelError` unless `base` is a stock T5, mT5 or UMT5 with a language-model head."""
    if not isinstance(base, BASES):
        allowed = ", ".join(kind.__name__ for kind in BASES)
        raise ModelError(
            f"model_name_or_path: found a {type(base).__name__}, allowed are {allowed}"
        )
    if getattr(base.config, "decoder_start_token_id", None) is None:
        raise ModelError(
            "model_name_or_path: config.json has no decoder_start_token_id; T5 starts from pad_token_id, mostly 0"
        )


def ffn_sites(base: PreTrainedModel) -> list[FfnSite]:
    """All FFNs, encoder then decoder, each from the first layer up."""
    sites = []
    for stack in STACKS:
        ffns = [module for module in getattr(base, stack).modules() if isinstance(module, FFNS)]
        sites += [FfnSite(stack, layer, ffn.DenseReluDense) for layer, ffn in enumerate(ffns)]
    return sites


def layer_norms(base: PreTrainedModel) -> Iterator[nn.Module]:
    """Every T5 layer norm, final ones included."""
    return (module for module in base.modules() if isinstance(module, LAYER_NORMS))


def replace_projection(site: FfnSite, make: Callable[[nn.Parameter], nn.Module]) -> None:
    """Put `make(weight of wo)` in the place of `wo`. T5 reads `wo.weight.dtype`, so it must keep a `weight`."""
    assert isinstance(site.dense.wo, nn.Linear), f"{site.name}: wo has been replaced before"
    site.dense.wo = make(site.dense.wo.weight)


def pass_ffn_input(site: FfnSite) -> None:
    """Hand the FFN's layer-normed input to the module in `wo`'s place: bottleneck experts have it as residual.

    The hook runs inside the block, hence again in the recompute of activation checkpointing.
    """

    def keep_input(dense: nn.Module, args: tuple[Tensor, ...]) -> None:
        dense.wo.ffn_input_BSD = args[0]

    site.dense.register_forward_pre_hook(keep_input)


def pass_encoder_prompt(base: PreTrainedModel, context: PassContext) -> None:
    """Before every decoder FFN, put the mean [B,D] of the encoder's states at the prompt into the context."""

    def keep_prompt_mean(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states_BSD = kwargs["key_value_states"]
        context.encoder_prompt_BD = states_BSD[:, : context.prompt_length].float().mean(dim=1)

    for module in base.decoder.modules():
        if isinstance(module, CROSS_ATTENTIONS):
            module.register_forward_pre_hook(keep_prompt_mean, with_kwargs=True)
