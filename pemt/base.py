"""The frozen base model and its tokenizer, from the hub or a local folder."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pemt.config import PemtError, RunConfig
from pemt.data import load_tokenizer

MODEL_TYPES = ("t5", "mt5", "umt5")


class BaseModelError(PemtError):
    """A base model or tokenizer that cannot be loaded, or is no T5."""


def load_base(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base model in fp32 and tokenizer of a run.

    Args:
        config: `model_name_or_path`, and `tokenizer_name` where the tokenizer lies elsewhere.

    Raises:
        BaseModelError: it cannot be loaded, it is no T5, or the tokenizer has more tokens than it.
    """
    name = config.model_name_or_path
    try:
        model_type = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"model_name_or_path: `{name}` cannot be loaded: {_first_line(error)}"
        ) from None
    if model_type not in MODEL_TYPES:
        raise BaseModelError(
            f"model_name_or_path: `{name}` is a {model_type} model; PEMT needs one of {', '.join(MODEL_TYPES)}"
        )
    tokenizer_name = config.tokenizer_name or name
    try:
        tokenizer = load_tokenizer(tokenizer_name)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"tokenizer_name: `{tokenizer_name}` cannot be loaded: {_first_line(error)}"
        ) from None
    try:
        # DeepSpeed casts to the run's precision and keeps its masters; everything starts from fp32.
        base = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"model_name_or_path: `{name}` cannot be loaded: {_first_line(error)}"
        ) from None
    if len(tokenizer) > base.config.vocab_size:
        raise BaseModelError(
            f"tokenizer_name: `{tokenizer_name}` has {len(tokenizer)} tokens, the base model "
            f"`{name}` embeds {base.config.vocab_size}; give the tokenizer it was trained with"
        )
    return base, tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
