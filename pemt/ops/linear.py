"""A linear layer's product where no gradient is wanted: on a CPU in float32 faster than `F.linear`.

For few rows, as when answering a token at a time, by a kernel of our own, which takes 0.5 to 0.8 of the time of
oneDNN; for many by oneDNN, which takes 0.9 of the time of the BLAS behind `F.linear` (LOG.md, 2026-11-25 and 26).

Shapes: I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import kernels_for

FEW_ROWS = 32  # of 64 and more, the gain is less, and smaller still where weights are in the cache


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` [..., O] of x [..., I], by the fastest way there is to the same sums.

    Raises:
        OpsError: PEMT_OPS names an implementation that cannot be had for x.
    """
    if not _serves(x, weight_OI):
        return F.linear(x, weight_OI, bias_O)
    few_rows = kernels_for(x).few_rows
    if few_rows is not None and x.numel() <= FEW_ROWS * x.shape[-1]:
        y = few_rows(x, weight_OI)
        return y if bias_O is None else y.add_(bias_O)
    if _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], None)
    return F.linear(x, weight_OI, bias_O)


def add_linear(y: Tensor, x: Tensor, weight_OI: Tensor) -> Tensor:
    """y [..., O] + x weightᵀ, in y's place; elsewhere than on a CPU in one product, rounded once."""
    if _serves(x, weight_OI):
        return y.add_(linear(x, weight_OI))
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight_OI.t())
    return y


def _serves(x: Tensor, weight_OI: Tensor) -> bool:
    return (
        not (torch.compiler.is_compiling() or torch.is_grad_enabled())
        and x.device.type == weight_OI.device.type == "cpu"
        and x.dtype == weight_OI.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _has_onednn() -> bool:
    # A private op of PyTorch's: it may go, or be left out of a build.
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
