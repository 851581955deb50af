"""A linear layer's product where no gradient is wanted: on a CPU in float32 faster than `F.linear`.

By oneDNN, the BLAS behind `F.linear`, or for few rows, as when generating a token at a time, a kernel of our own:
whichever is the fastest on this machine (`products`).

Shapes: I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import FEW_ROWS, ONEDNN, OWN, choose, onednn
from .select import kernels_for


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` [..., O] of x [..., I], by another way to the same sums.

    Raises:
        OpsError: PEMT_OPS names an implementation that cannot be had for x.
    """
    if not _serves(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    (outputs, inputs), rows = weight_OI.shape, x.numel() // x.shape[-1]
    few_rows = kernels_for(x).few_rows if rows <= FEW_ROWS else None
    way = choose(rows, inputs, outputs, transposed=weight_OI.is_contiguous(), few_rows=few_rows)
    if way == OWN:
        assert few_rows is not None
        y = few_rows(x, weight_OI)
        return y if bias_O is None else y.add_(bias_O)
    if way == ONEDNN:
        return onednn(x, weight_OI, bias_O)
    return F.linear(x, weight_OI, bias_O)


def add_linear(y: Tensor, x: Tensor, weight_OI: Tensor) -> Tensor:
    """y [..., O] + x weightᵀ: in y's place where `linear` serves, else by one `addmm`, which rounds once."""
    if _serves(x, weight_OI):
        return y.add_(linear(x, weight_OI))
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight_OI.t()).view_as(y)


def mixture_step(
    x: Tensor, weight_OI: Tensor, down_TI: Tensor, up_OT: Tensor, factors: Tensor
) -> Tensor:
    """A linear layer and the experts' mixture [B, S, O] of one step of `generate`, whose gates are known.

    Not the op: for a token at a time its checks and its dispatch cost a fifth of it, and no gradient wants the latent.

    Args:
        x: [B, S, I].
        weight_OI: the layer's own; down_TI, up_OT: the experts'.
        factors: [B, 1, T], each expert's gate times its scale, once per rank.
    """
    latent_BST = linear(x, down_TI) * factors
    return add_linear(linear(x, weight_OI), latent_BST, up_OT)


def _serves(x: Tensor, weight_OI: Tensor) -> bool:
    return (
        not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        and x.device.type == weight_OI.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and min(x.numel(), weight_OI.numel()) > 0
        and not torch.is_autocast_enabled("cpu")
    )
