"""Which base model an expert belongs to: its sizes, and a digest of its weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import PreTrainedConfig

from pemt.lazy_weights import value_of
from pemt.model.inject import Base

_KEYS = (
    "model_type",
    "d_model",
    "d_ff",
    "d_kv",
    "num_heads",
    "num_layers",
    "num_decoder_layers",
    "feed_forward_proj",
    "vocab_size",
)


def base_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that a bank entry and the base model it is put into must share."""
    return {key: getattr(config, key) for key in _KEYS}


def base_digest(base: Base) -> str:
    """Hex sha256 of two attention weights, of the first encoder and the last decoder block.

    Two base models of one shape, fine-tuned from the same one perhaps, differ in them; a copy
    under another name does not, nor one that was loaded in bfloat16 instead of float32.
    """
    digest = hashlib.sha256()
    blocks: list[Any] = [base.encoder.block[0], base.decoder.block[-1]]
    for block in blocks:
        weight = value_of(block.layer[0].SelfAttention.q.weight).to("cpu", torch.bfloat16)
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
