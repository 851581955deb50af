"""Experts split anew into factors, so that the norm of an expert's output is the norm of its latent.

F d_ff, D d_model, R rank of one expert, T the sum of the ranks.

An expert is the product s up down, and any split of it into factors is as good. With up = Q M, Q an isometry on M's
range, it is s Q (M down); then ||s Q l|| = |s| ||l|| for every latent l = M down x, and no Gram matrix is needed
(DESIGN: orthonormal experts). M is brought to the size of a rotation and its own size goes into s: so the latent is
about as large as that of the given factors, and half precision holds it wherever it held those.

Of all such splits it is the polar one, M = (up^T up)^1/2, the only one that rounding does not choose: Q and M may come
from two calls, on two machines, and belong together. Of a QR they need not: where columns depend on each other, as in
[a, a, b], the second direction is a rounding error brought to length 1, and b has a part along it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_factors, compute_dtype


@dataclass(frozen=True)
class Split:
    """up = size basis mix.

    Args:
        basis: [D, min(D, R)], in float32 (float64 for float64): columns orthonormal, where up's columns (of a rank
            above D: rows) are independent; else ||basis l|| = ||l|| for every l in mix's range, and basis l = 0 across
            it: a direction that is not the expert's gets no gradient.
        mix: [min(D, R), R] in float64.
        size: a power of two, so that it rounds nothing.
    """

    basis: Tensor
    mix: Tensor
    size: float

    def down(self, down_RF: Tensor) -> Tensor:
        """The other factor [min(D, R), F], in the basis's dtype."""
        return (self.mix @ down_RF.detach().to(self.mix)).to(self.basis.dtype)


def split(up_DR: Tensor) -> Split:
    """One expert's up projection [D, R], taken apart in float64."""
    left, values, right = torch.linalg.svd(up_DR.detach().double(), full_matrices=False)
    rounding = max(up_DR.shape) * torch.finfo(torch.float64).eps
    used = values > rounding * values.max()
    # back by the very turn that the singular vectors made: what is left does not depend on which of them were found
    turn = right if len(right) == up_DR.shape[1] else left.mT
    basis, mix = (left * used) @ turn, turn.mT @ ((values * used)[:, None] * right)
    norm = float(torch.linalg.vector_norm(mix)) / math.sqrt(len(mix))
    size = 2.0 ** round(math.log2(norm)) if norm > 0 else 1.0
    return Split(basis.to(compute_dtype(up_DR.dtype)), mix / size, size)


def orthonormal_experts(
    down: Tensor, up: Tensor, scales: Sequence[float], ranks: Sequence[int]
) -> tuple[Tensor, Tensor, list[float], list[int]]:
    """The same K experts as the ops want them.

    Args:
        down: [T, F] and up: [D, T], the experts' factors side by side; expert k owns ranks[k] rows and columns.
        scales: K factors (alpha / rank).
        ranks: K ranks with sum T.

    Returns:
        down, up, scales and ranks of experts with the same outputs, whose up projections are isometries (`Split`); in
        the dtypes given. A rank above D becomes D.

    Raises:
        OpsError: a shape is wrong.
    """
    check_factors(down, up, scales, ranks)
    splits = [split(up_DR) for up_DR in up.split(list(ranks), dim=1)]
    downs = zip(splits, down.split(list(ranks)), strict=True)
    return (
        torch.cat([each.down(down_RF) for each, down_RF in downs]).to(down.dtype),
        torch.cat([each.basis for each in splits], dim=1).to(up.dtype),
        [scale * each.size for scale, each in zip(scales, splits, strict=True)],
        [len(each.mix) for each in splits],
    )
