"""Random models of a published size, for measurements that ask how much and not how well.

D d_model, K experts, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from pemt.model import ExpertSource, Site, expert_shapes
from pemt.plan import Shape


def t5_config(shape: Shape) -> T5Config:
    """The configuration of a T5 that the planner knows by its sizes."""
    sizes: dict[str, Any] = {  # transformers declares no decoder_start_token_id, and asks for it
        "vocab_size": shape.vocab_size,
        "d_model": shape.d_model,
        "d_kv": shape.d_kv,
        "d_ff": shape.d_ff,
        "num_layers": shape.num_layers,
        "num_decoder_layers": shape.num_decoder_layers,
        "num_heads": shape.num_heads,
        "relative_attention_num_buckets": shape.buckets,
        "dropout_rate": shape.dropout,
        "feed_forward_proj": "gated-gelu" if shape.gated else "relu",
        "decoder_start_token_id": 0,
    }
    return T5Config(**sizes)


def random_t5(shape: Shape, dtype: torch.dtype = torch.float32) -> T5ForConditionalGeneration:
    """A T5 of these sizes on torch's default device, made in this dtype and in no other before."""
    base = AutoModelForSeq2SeqLM.from_config(t5_config(shape), dtype=dtype)
    if not shape.tied:  # transformers unties what it loads, not what it makes
        head_VD = torch.randn(shape.vocab_size, shape.d_model, dtype=dtype)
        base.lm_head.weight = nn.Parameter(head_VD * shape.d_model**-0.5)
    return base


def random_sources(
    shape: dict[str, Any],
    *,
    ranks: Sequence[int],
    prompt_tokens: int,
    sites: Sequence[Sequence[Site]] | None = None,
) -> list[ExpertSource]:
    """K LoRA experts whose outputs are about as large as those of trained ones.

    Args:
        shape: `base_shape` of the base model.
        ranks: of each expert.
        prompt_tokens: P of each one's prompt.
        sites: of each; by default every FFN's output.
    """
    return [
        ExpertSource(
            name=f"source-{k}",
            kind="lora",
            rank=rank,
            alpha=rank,
            weights={
                key: torch.randn(size) * size[1] ** -0.5
                for key, size in expert_shapes(
                    "lora", rank, shape, sites[k] if sites else None
                ).items()
            },
            prompt_PD=torch.randn(prompt_tokens, shape["d_model"]),
        )
        for k, rank in enumerate(ranks)
    ]
