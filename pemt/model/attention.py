"""T5's position bias and mask, added once for all layers of a stack.

transformers adds them in every layer anew, and the attention of PyTorch keeps each sum [B,H,Q,K] for the backward
pass: over flan-t5-xl's encoder, 32 x 276 tokens in bf16, 3.7 GB. A stack's first layer makes the bias and the others
are handed that same tensor; where it is frozen one sum serves them all.

Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pemt_sdpa"
_SUM = "pemt_sum"  # on a bias: what was added to it, and the sum


def share_sums(base: PreTrainedModel) -> None:
    """Let this base model's layers share their sums; for as long as it lives.

    A model whose attention is not PyTorch's (`sdpa`) keeps its own: an older transformers, or `eager` by choice.
    """
    if base.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        base.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, which is handed the sum as its mask where the bias is frozen.

    A compiled block is a program of its own and takes the sum itself, as it is written in transformers.
    """
    queries, keys = query.shape[2], key.shape[2]
    causal = attention_mask is None and bool(module.is_causal) and queries > 1
    if (
        not torch.compiler.is_compiling()
        and position_bias is not None
        and position_bias.grad_fn is None
        and "is_causal" not in kwargs
        and not (causal and queries != keys)
    ):
        # A leaf that requires grad is transformers' tensor of zeros under checkpointing: nobody reads its gradient.
        attention_mask, position_bias = _sum(position_bias, attention_mask, causal, key.dtype), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **kwargs
    )


def _sum(bias: Tensor, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> Tensor:
    """[1 or B,H,Q,K]: the bias where there is attention, else the least of the keys' dtype; made once for them all."""
    known: tuple[Tensor | None, bool, torch.dtype, Tensor] | None = getattr(bias, _SUM, None)
    if known is None or known[0] is not mask or known[1:3] != (causal, dtype):
        known = mask, causal, dtype, _added(bias.detach(), mask, causal, dtype).contiguous()
        # It lives as long as the bias: for this pass and its recomputation.
        setattr(bias, _SUM, known)
    return known[3]


def _added(bias: Tensor, mask: Tensor | None, causal: bool, dtype: torch.dtype) -> Tensor:
    if mask is None and not causal:
        return bias
    if mask is None:
        mask = bias.new_ones(bias.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype != torch.bool:
        return bias + mask
    return torch.where(mask, bias, torch.finfo(dtype).min)
