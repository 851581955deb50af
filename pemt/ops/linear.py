"""A linear layer's product where no gradient is wanted: on a CPU in float32 faster than `F.linear`.

For few rows, as when answering a token at a time, by a kernel of our own: with AVX-512 8 to 32 rows take 0.55 to
0.85 of oneDNN's time, one row 0.7 to 1.1. For many by oneDNN, which takes 0.9 of the time of the BLAS behind
`F.linear` (LOG.md, 2026-11-25 and 26).

Shapes: I input width, O output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .select import kernels_for

FEW_ROWS = 32  # beyond, less is gained: 64 rows take 0.80 to 0.91 of oneDNN's time


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` [..., O] of x [..., I], by another way to the same sums.

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
    """y [..., O] + x weightᵀ: in y's place where `linear` serves, else by one `addmm`, which rounds once."""
    if _serves(x, weight_OI):
        return y.add_(linear(x, weight_OI))
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight_OI.t()).view_as(y)


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
