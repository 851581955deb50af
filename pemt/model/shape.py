"""What of a base model's configuration an expert depends on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

_KEYS = (
    "model_type",
    "d_model",
    "d_ff",
    "num_layers",
    "num_decoder_layers",
    "feed_forward_proj",
    "vocab_size",
)


def base_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that a bank entry and the base model it is put into must share."""
    return {key: getattr(config, key) for key in _KEYS}
