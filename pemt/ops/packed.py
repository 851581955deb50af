"""The two ops and their backward in plain PyTorch, by identities in the experts' latent space.

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

from .checks import compute_dtype

COSINE_EPS = 1e-8  # torch.nn.functional.cosine_similarity's default


def expert_mixture(
    x_BSF: Tensor, weight_DF: Tensor, down_TF: Tensor, up_DT: Tensor, gates_BK: Tensor,
    scales: Sequence[float], ranks: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [B,S,D], latent [B,S,T]): three matrix products, whatever K is."""
    batch, tokens, d_ff = x_BSF.shape
    x_NF = x_BSF.reshape(-1, d_ff)
    latent_NT = x_NF @ down_TF.T
    latent_BST = latent_NT.view(batch, tokens, down_TF.shape[0])
    gated_BST = (latent_BST * _rank_factors(gates_BK, scales, ranks)[:, None]).to(x_BSF.dtype)
    y_ND = (x_NF @ weight_DF.T).addmm_(gated_BST.flatten(0, 1), up_DT.T)
    return y_ND.view(batch, tokens, weight_DF.shape[0]), latent_BST


def expert_mixture_backward(
    dy_BSD: Tensor, dlatent_BST: Tensor | None, latent_BST: Tensor,
    weight_DF: Tensor, down_TF: Tensor, up_DT: Tensor, gates_BK: Tensor,
    scales: Sequence[float], ranks: Sequence[int], need_dx: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [B,S,F], or an empty tensor where it is not needed; dgates [B,K])."""
    batch, tokens, d_model = dy_BSD.shape
    precise = compute_dtype(dy_BSD.dtype)
    dy_ND = dy_BSD.reshape(-1, d_model)
    projection_BST = (dy_ND @ up_DT).view(latent_BST.shape)
    products_BT = (latent_BST.to(precise) * projection_BST).sum(dim=1)
    dgates_BK = _scaled(_sum_ranks(products_BT, ranks), scales)
    if not need_dx:
        return dy_BSD.new_empty(0), dgates_BK.to(gates_BK.dtype)
    dlatent = projection_BST * _rank_factors(gates_BK, scales, ranks)[:, None]
    if dlatent_BST is not None:
        dlatent = dlatent + dlatent_BST
    dx_NF = (dy_ND @ weight_DF).addmm_(dlatent.to(dy_BSD.dtype).flatten(0, 1), down_TF)
    return dx_NF.view(batch, tokens, weight_DF.shape[1]), dgates_BK.to(gates_BK.dtype)


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


def task_sparsity_backward(
    grad: Tensor, z_BSD: Tensor, latent_BST: Tensor, up_DT: Tensor,
    gates_BK: Tensor, scales: Sequence[float], ranks: Sequence[int],
    token_weights_BS: Tensor | None,
    projection_BST: Tensor, stats_BSC: Tensor, distance_K: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz [B,S,D], dlatent [B,S,T], dgates [B,K])."""
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
    dz_BSD = (shrink_z_BS1 * z_BSD).to(z_BSD.dtype)
    dz_BSD.view(-1, z_BSD.shape[-1]).addmm_(
        (along_BST * latent).to(z_BSD.dtype).flatten(0, 1), up_DT.T
    )
    dgates_BK = (grad * distance_K / max(1, gates_BK.shape[0])).expand_as(gates_BK)
    return dz_BSD, dlatent_BST.to(latent_BST.dtype), dgates_BK.to(gates_BK.dtype).contiguous()


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


def _rank_factors(gates_BK: Tensor, scales: Sequence[float], ranks: Sequence[int]) -> Tensor:
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
