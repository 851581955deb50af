"""The op and its backward pass in plain PyTorch, by identities in the experts' latent space.

B batch, S tokens, F d_ff, D d_model, K experts, R rank of one expert, T the sum of the ranks.

With o_k = s_k latent_k up_k^T, projection = z up, and up_k an isometry on the latents:
    <z, o_k>  = s_k <latent_k, projection_k>
    ||o_k||   = |s_k| ||latent_k||
    d loss / d gate_bk of the mixture = s_k sum over tokens <latent_k, (dy up)_k>
so no expert output of width D is ever made. It runs on every device where no kernel is built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from .checks import compute_dtype

COSINE_EPS = 1e-8  # torch.nn.functional.cosine_similarity's default


def ffn_output(
    x_BSF: Tensor, stacked_XF: Tensor, up_DT: Tensor, gates_BK: Tensor,
    adapter_down_HD: Tensor | None, adapter_down_bias_H: Tensor | None,
    adapter_up_DH: Tensor | None, adapter_up_bias_D: Tensor | None,
    scales: Sequence[float], ranks: Sequence[int], token_weights_BS: Tensor | None, sparsity: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `ffn_output` of csrc/ops.h: z, loss, and what the backward pass wants."""
    batch, tokens, d_ff = x_BSF.shape
    d_model, total = up_DT.shape

    def nothing() -> Tensor:  # outputs may not be one tensor
        return x_BSF.new_empty(0)

    x_NF = x_BSF.reshape(-1, d_ff)
    sizes = [d_model, total]
    if adapter_down_HD is None:  # y is not kept
        y_ND, latent_NT = (x_NF @ each_XF.T for each_XF in stacked_XF.split(sizes))
        mixed_NX = latent_NT
    else:
        mixed_NX = x_NF @ stacked_XF.T
        y_ND, latent_NT = mixed_NX.split(sizes, dim=1)
    factors_BT = rank_factors(gates_BK, scales, ranks)
    gated_BST = (latent_NT.view(batch, tokens, total) * factors_BT[:, None]).to(x_BSF.dtype)
    y_ND.addmm_(gated_BST.flatten(0, 1), up_DT.T)
    hidden, active = nothing(), nothing()
    if adapter_down_HD is None or adapter_up_DH is None:
        z_BSD = y_ND.view(batch, tokens, d_model)
    else:
        hidden = linear(y_ND, adapter_down_HD, adapter_down_bias_H)
        hidden = hidden.view(batch, tokens, len(adapter_down_HD))
        active = gelu(hidden, approximate="tanh")
        z_BSD = linear(active, adapter_up_DH, adapter_up_bias_D)
        z_BSD.add_(y_ND.view(z_BSD.shape))
    loss, *kept = nothing(), nothing(), nothing(), nothing()
    if sparsity:
        latent_BST = latent_NT.view(batch, tokens, total)
        loss, *kept = task_sparsity(
            z_BSD, latent_BST, up_DT, gates_BK, scales, ranks, token_weights_BS
        )
    mixed_BSX = mixed_NX.view(batch, tokens, mixed_NX.shape[1])
    return z_BSD, loss, mixed_BSX, hidden, active, kept[0], kept[1], kept[2]


def ffn_output_backward(
    dz_BSD: Tensor | None, dloss: Tensor | None, z_BSD: Tensor, mixed_BSX: Tensor,
    hidden_BSH: Tensor, active_BSH: Tensor, projection_BST: Tensor, stats_BSC: Tensor,
    distance_K: Tensor, stacked_XF: Tensor, up_DT: Tensor, gates_BK: Tensor,
    adapter_down_HD: Tensor | None, adapter_up_DH: Tensor | None,
    scales: Sequence[float], ranks: Sequence[int], token_weights_BS: Tensor | None, need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `ffn_output_backward` of csrc/ops.h: gradients of x, of the gates, of the adapter's four."""
    batch, tokens, _ = mixed_BSX.shape
    d_model, total = up_DT.shape

    def nothing() -> Tensor:  # outputs may not be one tensor
        return mixed_BSX.new_empty(0)

    latent_BST = mixed_BSX[..., -total:]
    # the gradient of [y | latent]: each product adds to its part of it
    whole_NX = mixed_BSX.new_empty(batch * tokens, d_model + total)
    dy_ND, dlatent_NT = whole_NX.split([d_model, total], dim=1)
    dgates_BK = torch.zeros_like(gates_BK, dtype=compute_dtype(gates_BK.dtype))
    if dloss is None:
        assert dz_BSD is not None
        dy_ND.copy_(dz_BSD.reshape(-1, d_model))
        dlatent_NT.zero_()
    else:
        given = (dz_BSD, z_BSD, latent_BST, up_DT, gates_BK, scales, ranks, token_weights_BS)
        kept = (projection_BST, stats_BSC, distance_K)
        dz_ND, mix_NT, dlatent, dgates_BK = _sparsity_backward(dloss, *given, *kept)
        torch.addmm(dz_ND, mix_NT, up_DT.T, out=dy_ND)
        dlatent_NT.copy_(dlatent)
    ddown, ddown_bias, dup, dup_bias = (nothing() for _ in range(4))
    if adapter_down_HD is not None and adapter_up_DH is not None:
        dup_bias, dup = dy_ND.sum(0), dy_ND.T @ active_BSH.flatten(0, 1)
        dhidden_NH = torch.ops.aten.gelu_backward(
            dy_ND @ adapter_up_DH, hidden_BSH.flatten(0, 1), approximate="tanh"
        )
        ddown_bias, ddown = dhidden_NH.sum(0), dhidden_NH.T @ mixed_BSX[..., :d_model].flatten(0, 1)
        dy_ND.addmm_(dhidden_NH, adapter_down_HD)
    projection = (dy_ND @ up_DT).view(latent_BST.shape)
    products_BT = (latent_BST.to(compute_dtype(projection.dtype)) * projection).sum(dim=1)
    dgates_BK = dgates_BK + _scaled(_sum_ranks(products_BT, ranks), scales)
    part = projection * rank_factors(gates_BK, scales, ranks)[:, None]
    dlatent_NT.copy_(dlatent_NT + part.flatten(0, 1))
    dx = nothing()
    if need_dx:
        dx = (whole_NX @ stacked_XF).view(batch, tokens, stacked_XF.shape[1])
    return dx, dgates_BK.to(gates_BK.dtype), ddown, ddown_bias, dup, dup_bias


def task_sparsity(
    z_BSD: Tensor, latent_BST: Tensor, up_DT: Tensor, gates_BK: Tensor,
    scales: Sequence[float], ranks: Sequence[int], token_weights_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, and for backward: projection [B,S,T], stats [B,S,2K+1], mean distances [K]).

    stats holds per token the cosines, the norms of the expert outputs and the norm of z.
    """
    precise = compute_dtype(z_BSD.dtype)
    projection_BST = (z_BSD.reshape(-1, z_BSD.shape[-1]) @ up_DT).view(latent_BST.shape)
    latent = latent_BST.to(precise)
    dot_BSK = _scaled(_sum_ranks(latent * projection_BST, ranks), scales)
    square_BSK = _sum_ranks(latent * latent, ranks)
    norm_BSK = _scaled(square_BSK.sqrt(), [abs(scale) for scale in scales])
    norm_z_BS1 = torch.linalg.vector_norm(z_BSD, dim=-1, keepdim=True, dtype=precise)
    cosine_BSK = dot_BSK / (norm_BSK.clamp(min=COSINE_EPS) * norm_z_BS1.clamp(min=COSINE_EPS))
    weights_BS1 = _token_weights(token_weights_BS, cosine_BSK)
    distance_K = ((1 - cosine_BSK) * weights_BS1).sum(dim=(0, 1))
    loss = (_mean_gates(gates_BK, precise) * distance_K).sum()
    return loss, projection_BST, torch.cat([cosine_BSK, norm_BSK, norm_z_BS1], -1), distance_K


def _sparsity_backward(
    grad: Tensor, dz_BSD: Tensor | None, z_BSD: Tensor, latent_BST: Tensor, up_DT: Tensor,
    gates_BK: Tensor, scales: Sequence[float], ranks: Sequence[int],
    token_weights_BS: Tensor | None,
    projection_BST: Tensor, stats_BSC: Tensor, distance_K: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz and the loss's part along z [N,D], what up is to be multiplied with [N,T], dlatent [N,T], dgates [B,K])."""
    experts = len(ranks)
    cosine_BSK, norm_BSK, norm_z_BS1 = stats_BSC.split([experts, experts, 1], dim=-1)
    latent = latent_BST.to(stats_BSC.dtype)
    safe_BSK, safe_z_BS1 = norm_BSK.clamp(min=COSINE_EPS), norm_z_BS1.clamp(min=COSINE_EPS)
    weight_BSK = (
        _mean_gates(gates_BK, latent.dtype) * grad * _token_weights(token_weights_BS, cosine_BSK)
    )
    # cosine_similarity clamps its norms outside of autograd: the clamped value divides, the
    # gradient is that of the unclamped norm, and 0 at 0.
    along_BSK = _scaled(-weight_BSK, scales) / (safe_BSK * safe_z_BS1)
    squares = [scale * scale for scale in scales]
    shrink_BSK = _scaled(weight_BSK * cosine_BSK, squares) * _over(safe_BSK, norm_BSK)
    shrink_z_BS1 = (weight_BSK * cosine_BSK).sum(-1, keepdim=True) * _over(safe_z_BS1, norm_z_BS1)

    along_BST = _per_rank(along_BSK, ranks)
    dlatent_BST = along_BST * projection_BST + _per_rank(shrink_BSK, ranks) * latent
    whole_BSD = shrink_z_BS1 * z_BSD
    if dz_BSD is not None:
        whole_BSD = whole_BSD + dz_BSD
    rounded = (whole_BSD, along_BST * latent, dlatent_BST)
    dgates_BK = (grad * distance_K / max(1, gates_BK.shape[0])).expand_as(gates_BK)
    whole, mix, dlatent = (each.to(z_BSD.dtype).flatten(0, 1) for each in rounded)
    return whole, mix, dlatent, dgates_BK


def _over(safe: Tensor, norm: Tensor) -> Tensor:
    """1 / (clamped norm * norm), and 0 where the norm is 0."""
    return torch.where(norm > 0, 1 / (safe * norm), 0)


def _scaled(value_K: Tensor, scales: Sequence[float]) -> Tensor:
    """[..., K] times each expert's factor. No tensor of the factors: a GPU would be waited for to copy it."""
    if len(set(scales)) == 1:
        return value_K * scales[0]
    parts = zip(value_K.unbind(-1), scales, strict=True)
    return torch.stack([part * scale for part, scale in parts], dim=-1)


def _per_rank(value_K: Tensor, ranks: Sequence[int]) -> Tensor:
    """[..., K] -> [..., T]: the value of every expert, once per rank."""
    parts = [part.expand(*part.shape[:-1], rank)
             for part, rank in zip(value_K.split(1, dim=-1), ranks, strict=True)]  # fmt: skip
    return torch.cat(parts, dim=-1)


def rank_factors(gates_BK: Tensor, scales: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """gate * scale of every expert, once per rank: [B, T]."""
    gates = gates_BK.to(compute_dtype(gates_BK.dtype))
    return _per_rank(_scaled(gates, scales), ranks)


def _sum_ranks(value_T: Tensor, ranks: Sequence[int]) -> Tensor:
    """[..., T] -> [..., K]: the sum over the ranks of every expert."""
    return torch.stack([part.sum(-1) for part in value_T.split(list(ranks), dim=-1)], dim=-1)


def _token_weights(token_weights_BS: Tensor | None, like_BSK: Tensor) -> Tensor:
    if token_weights_BS is not None:
        return token_weights_BS.to(like_BSK.dtype)[..., None]
    tokens = like_BSK.shape[0] * like_BSK.shape[1]
    return like_BSK.new_full((1, 1, 1), 1 / max(1, tokens))


def _mean_gates(gates_BK: Tensor, dtype: torch.dtype) -> Tensor:
    return gates_BK.to(dtype).sum(dim=0) / max(1, gates_BK.shape[0])
