"""Finds, by type, the places in a stock T5, mT5 or UMT5 where PEMT's modules go.

Shapes: B batch, S tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from pemt.model.experts import ModelError

Base: TypeAlias = (
    T5ForConditionalGeneration | MT5ForConditionalGeneration | UMT5ForConditionalGeneration
)
FFNS = (T5LayerFF, MT5LayerFF, UMT5LayerFF)
LAYER_NORMS = (T5LayerNorm, MT5LayerNorm, UMT5LayerNorm)
# the keyword under which each cross-attention is handed the encoder's states
ENCODER_STATES: dict[type[nn.Module], str] = {
    T5LayerCrossAttention: "key_value_states",
    MT5LayerCrossAttention: "key_value_states",
    UMT5LayerCrossAttention: "encoder_hidden_states",
}


@dataclass(frozen=True)
class FfnSite:
    """One FFN of the base model; `dense` is its DenseReluDense, whose child `wo` is replaced."""

    stack: str
    layer: int
    dense: Any

    @property
    def name(self) -> str:
        """`<stack>.<layer>`, as the experts' tensors are named."""
        return f"{self.stack}.{self.layer}"

    @property
    def in_decoder(self) -> bool:
        """Whether it is one of the decoder's."""
        return self.stack == "decoder"

    @property
    def weight(self) -> nn.Parameter:
        """The weight [D,F] of `wo`."""
        assert isinstance(self.dense.wo, nn.Linear), f"{self.name}: wo has been replaced before"
        weight = self.dense.wo.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def replace_projection(self, module: nn.Module) -> None:
        """Put a module in `wo`'s place; T5 reads `wo.weight.dtype`, so it must have a `weight`."""
        assert isinstance(module.weight, nn.Parameter)
        self.dense.wo = module

    def pass_ffn_input(self) -> None:
        """Hand the FFN's layer-normed input [B,S,D] to the module in `wo`'s place.

        The hook runs inside the block, hence again when checkpointing recomputes it.
        """
        self.dense.register_forward_pre_hook(_keep_ffn_input)


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


def ffn_sites(base: Base) -> list[FfnSite]:
    """All FFNs, encoder then decoder, each from the first layer up."""
    sites = []
    for name, stack in (("encoder", base.encoder), ("decoder", base.decoder)):
        ffns = [module for module in stack.modules() if isinstance(module, FFNS)]
        sites += [FfnSite(name, layer, ffn.DenseReluDense) for layer, ffn in enumerate(ffns)]
    return sites


def layer_norms(base: Base) -> Iterator[nn.Module]:
    """Every T5 layer norm, final ones included."""
    return (module for module in base.modules() if isinstance(module, LAYER_NORMS))


def pass_encoder_prompt(base: Base, context: PassContext) -> None:
    """Before every decoder FFN, put the mean of the encoder's states at the prompt in the context.

    The hooks are on cross-attention, inside the blocks: see `PassContext`.
    """

    def keep_prompt_mean(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        name = ENCODER_STATES[type(module)]
        return args, {**kwargs, name: context.keep_encoder_prompt(kwargs[name])}

    for module in base.decoder.modules():
        if type(module) in ENCODER_STATES:
            module.register_forward_pre_hook(keep_prompt_mean, with_kwargs=True)
