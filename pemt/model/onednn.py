"""Linear layers by oneDNN, while PEMT answers on a CPU.

In float32 its products take a tenth less time than the BLAS behind `F.linear`, and the head's, with a few tokens at
a time, a third less (LOG.md, 2026-11-25); the compiled op takes its own through it too.

Shapes: I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def onednn_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's linear layers call `linear`.

    A model with compiled blocks keeps its own: another `forward` would have each block compiled anew.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module) and not compiled
    ]
    try:
        for layer in layers:
            layer.forward = MethodType(_forward, layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` [..., O] of x [..., I], by oneDNN where it serves: float32 on a CPU, where no gradient is wanted."""
    if (
        x.dtype == weight_OI.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and not torch.compiler.is_compiling()
        and _is_there()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], None)
    return F.linear(x, weight_OI, bias_O)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _is_there() -> bool:
    # A private op of PyTorch's: it may go, or be left out of a build.
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
