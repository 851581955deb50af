"""The specification: a loop over the experts in plain PyTorch, differentiable by autograd.

B batch, S tokens, F d_ff, D d_model, K experts, R rank of one expert, T the sum of the ranks, C width of
what a gate reads.

Everything else in this package computes what these functions compute, without the outputs of
width D per expert that they make. Run them directly for the truth; `PEMT_OPS=reference` runs their
forward inside the op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, linear

from .checks import compute_dtype


def gates(context_BC: Tensor, gate_CK: Tensor) -> Tensor:
    """softmax(context gate) [B, K], in float32 (float64 for float64), under autocast too.

    bf16 would round small preferences away.
    """
    precise = compute_dtype(context_BC.dtype)
    with torch.autocast(context_BC.device.type, enabled=False):
        return torch.softmax(context_BC.to(precise) @ gate_CK.to(precise), dim=-1)


def expert_mixture(
    x_BSF: Tensor, weight_DF: Tensor, down_TF: Tensor, up_DT: Tensor, gates_BK: Tensor,
    scales: Sequence[float], ranks: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = wo(x) + sum_k g_k o_k, and the experts' latents (x down_k^T, side by side)."""
    y_BSD = linear(x_BSF, weight_DF)
    latents = []
    factors = zip(down_TF.split(list(ranks)), up_DT.split(list(ranks), dim=1), strict=True)
    for k, (down_RF, up_DR) in enumerate(factors):
        latent_BSR = linear(x_BSF, down_RF)
        output_BSD = scales[k] * linear(latent_BSR, up_DR)
        y_BSD = y_BSD + gates_BK[:, k, None, None].to(x_BSF.dtype) * output_BSD
        latents.append(latent_BSR)
    return y_BSD, torch.cat(latents, dim=-1)


def adapted(y_BSD: Tensor, adapter: Sequence[Tensor]) -> Tensor:
    """z = y + up(gelu_new(down(y))); the adapter is (down [H,D], its bias, up [D,H], its bias), or empty."""
    if not adapter:
        return y_BSD
    down_HD, down_bias_H, up_DH, up_bias_D = adapter
    hidden_BSH = gelu(linear(y_BSD, down_HD, down_bias_H), approximate="tanh")
    return y_BSD + linear(hidden_BSH, up_DH, up_bias_D)


def expert_cosines(
    z_BSD: Tensor, latent_BST: Tensor, up_DT: Tensor, scales: Sequence[float], ranks: Sequence[int]
) -> Tensor:
    """cos(z, o_k) of every token and expert, [B, S, K], in float32 or float64."""
    precise = compute_dtype(z_BSD.dtype)
    cosines = []
    factors = zip(
        latent_BST.split(list(ranks), dim=-1), up_DT.split(list(ranks), dim=1), strict=True
    )
    for k, (latent_BSR, up_DR) in enumerate(factors):
        output_BSD = scales[k] * linear(latent_BSR, up_DR)
        cosines.append(cosine_similarity(z_BSD.to(precise), output_BSD.to(precise), dim=-1))
    return torch.stack(cosines, dim=-1)


def task_sparsity(
    z_BSD: Tensor, latent_BST: Tensor, up_DT: Tensor, gates_BK: Tensor,
    scales: Sequence[float], ranks: Sequence[int], token_weights_BS: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """sum_k mean_b(g_bk) * (weighted mean over the tokens of 1 - cos(z, o_k)).

    The token weights sum to one; without them every token counts alike.
    """
    distance_BSK = 1 - expert_cosines(z_BSD, latent_BST, up_DT, scales, ranks)
    if token_weights_BS is None:
        distance_K = distance_BSK.mean(dim=(0, 1))
    else:
        distance_K = (distance_BSK * token_weights_BS[..., None]).sum(dim=(0, 1))
    return (gates_BK.to(distance_K.dtype).mean(dim=0) * distance_K).sum()


def ffn_output(
    x_BSF: Tensor, weight_DF: Tensor, down_TF: Tensor, up_DT: Tensor, gates_BK: Tensor,
    adapter: Sequence[Tensor], scales: Sequence[float], ranks: Sequence[int],
    token_weights_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z, loss): the mixture, the target adapter behind it, the loss of what comes out."""
    y_BSD, latent_BST = expert_mixture(x_BSF, weight_DF, down_TF, up_DT, gates_BK, scales, ranks)
    z_BSD = adapted(y_BSD, adapter)
    return z_BSD, task_sparsity(z_BSD, latent_BST, up_DT, gates_BK, scales, ranks, token_weights_BS)
