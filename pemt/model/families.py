"""What each family of base models calls its parts: a row a family. Neither torch nor transformers is needed for that.

Linear layers have T5's names in the sites, gates and banks of every family: of an attention `q k v o`, of an FFN `wi`
or, where it is gated, `wi_0` (with the activation) and `wi_1`, and `wo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pemt.config import PemtError

STACKS = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class Part:
    """An attention or FFN of a block; names are relative to the block.

    Args:
        module: the attention or FFN.
        linears: its linear layers in the order of a pass, by T5's names.
        norms: the layer norms around it, in the order of a pass.
    """

    module: str
    linears: Mapping[str, str]
    norms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Args:
        model_type: in its config.json.
        title: for people.
        stacks: the modules of encoder and decoder, and `blocks` the blocks within one.
        parts: of a block of each stack: `self`, `cross`, `ffn`.
        final_norm: of a stack.
        position_bias: beside an attention's linear layers, where there is one.
        embeddings: of the encoder's and of the decoder's tokens.
        head: the linear layer that gives the logits.
        decoder_start: where its configuration has the id that a decoder starts from.
        sizes: where its configuration has what `base_shape` tells; `decoder_` begins those of a decoder with sizes
            of its own.
        tied_by_config: its configuration's `tie_word_embeddings` tells whether the head is the decoder's embedding.
        cache_as_deep_as_encoder: transformers gives the cache of its `generate` the encoder's depth, not the decoder's.
        takes_prefix: peft's prefixes fit before the keys and values of its decoder.
        fp16_overflows_from: d_model from which on its activations are known to exceed fp16.
    """

    model_type: str
    title: str
    stacks: Mapping[str, str]
    blocks: str
    parts: Mapping[str, Mapping[str, Part]]
    final_norm: str
    position_bias: str | None
    embeddings: tuple[str, str]
    head: str
    decoder_start: str
    sizes: Mapping[str, str]
    tied_by_config: bool
    cache_as_deep_as_encoder: bool
    takes_prefix: bool
    fp16_overflows_from: int

    def block(self, stack: str, layer: int) -> str:
        """A block's name in transformers."""
        return f"{self.stacks[stack]}.{self.blocks}.{layer}"


_ATTENTION = ("q", "k", "v", "o")
_FFN = ("wi", "wi_0", "wi_1", "wo")
_T5_SIZES = (
    "d_model",
    "d_ff",
    "d_kv",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "feed_forward_proj",
    "vocab_size",
)
_GEMMA_SIZES = {  # of each stack
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "d_kv": "head_dim",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


def _t5(model_type: str, title: str) -> Family:
    def part(module: str, layer: int, linears: tuple[str, ...]) -> Part:
        return Part(
            module=f"layer.{layer}.{module}",
            linears={name: name for name in linears},
            norms=(f"layer.{layer}.layer_norm",),
        )

    attention = part("SelfAttention", 0, _ATTENTION)
    return Family(
        model_type=model_type,
        title=title,
        stacks={stack: stack for stack in STACKS},
        blocks="block",
        parts={
            "encoder": {"self": attention, "ffn": part("DenseReluDense", 1, _FFN)},
            "decoder": {
                "self": attention,
                "cross": part("EncDecAttention", 1, _ATTENTION),
                "ffn": part("DenseReluDense", 2, _FFN),
            },
        },
        final_norm="final_layer_norm",
        position_bias="relative_attention_bias",
        embeddings=("shared", "shared"),
        head="lm_head",
        decoder_start="decoder_start_token_id",
        sizes={key: key for key in _T5_SIZES},
        tied_by_config=False,  # not since transformers 5
        cache_as_deep_as_encoder=True,  # as of transformers 5.23
        takes_prefix=True,
        fp16_overflows_from=1024,  # t5-large, t5-3b and their v1.1
    )


def _t5gemma() -> Family:
    def attention(name: str) -> Part:
        return Part(
            module=f"{name}_attn",
            linears={projection: f"{projection}_proj" for projection in _ATTENTION},
            norms=(f"pre_{name}_attn_layernorm", f"post_{name}_attn_layernorm"),
        )

    ffn = Part(
        module="mlp",
        linears={"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"},
        norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )
    return Family(
        model_type="t5gemma",
        title="T5Gemma",
        stacks={stack: f"model.{stack}" for stack in STACKS},
        blocks="layers",
        parts={
            "encoder": {"self": attention("self"), "ffn": ffn},
            "decoder": {"self": attention("self"), "cross": attention("cross"), "ffn": ffn},
        },
        final_norm="norm",
        position_bias=None,
        embeddings=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
        head="lm_head.out_proj",
        decoder_start="decoder.bos_token_id",
        sizes={
            **{key: f"encoder.{name}" for key, name in _GEMMA_SIZES.items()},
            "num_layers": "encoder.num_hidden_layers",
            "num_decoder_layers": "decoder.num_hidden_layers",
            "feed_forward_proj": "encoder.hidden_activation",
            **{f"decoder_{key}": f"decoder.{name}" for key, name in _GEMMA_SIZES.items()},
        },
        tied_by_config=True,
        cache_as_deep_as_encoder=False,
        takes_prefix=False,  # fewer heads have keys, and local attention would forget it
        fp16_overflows_from=0,  # as every Gemma 2
    )


FAMILIES: dict[str, Family] = {
    each.model_type: each
    for each in (_t5("t5", "T5"), _t5("mt5", "mT5"), _t5("umt5", "UMT5"), _t5gemma())
}
# Encoder-decoders near to these that no row fits, and why.
UNFIT: dict[str, str] = {
    "t5gemma2": "its decoder has one attention over both its own tokens and the encoder's"
}


def family_of(shape: Mapping[str, Any]) -> Family:
    """The row of a base model with this `base_shape`.

    Raises:
        PemtError: there is none.
    """
    found = FAMILIES.get(str(shape.get("model_type")))
    if found is None:
        raise PemtError(
            f"model_type: found {shape.get('model_type')} for a base model; allowed are {', '.join(FAMILIES)}"
        )
    return found


def stack_size(shape: Mapping[str, Any], stack: str, name: str) -> int:
    """Of one stack: `d_model`, `d_ff`, `d_kv`, `num_heads`, `num_key_value_heads` or `vocab_size`."""
    own = f"decoder_{name}"
    found = shape[own] if stack == "decoder" and own in shape else shape.get(name)
    # every head of a T5 has keys and values of its own
    return int(shape["num_heads"] if found is None else found)


def is_gated(shape: Mapping[str, Any]) -> bool:
    """Whether the FFNs of a base model of this `base_shape` have two input projections."""
    always = "wi" not in family_of(shape).parts["encoder"]["ffn"].linears
    return always or str(shape["feed_forward_proj"]).startswith("gated")
