"""Argument checks of the public ops, and the error they raise.

B batch, S tokens, F d_ff, D d_model, K experts, T the sum of the K ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_EXPERTS = 128  # as kMaxExperts in csrc/kernels.h


class OpsError(ValueError):
    """An argument of an op has the wrong shape, dtype or gradient flag, or no kernel can be had."""


def check_output(
    x: Tensor, stacked: Tensor, up: Tensor, adapter: Sequence[Tensor],
    scales: Sequence[float], ranks: Sequence[int], token_weights: Tensor | None,
) -> None:  # fmt: skip
    """Raise OpsError unless these, and gates, are arguments of `ffn_output`."""
    _check_experts(scales, ranks)
    _check_dims(x=(x, 3), stacked=(stacked, 2), up=(up, 2))
    (batch, tokens, d_ff), d_model, total = x.shape, len(up), sum(ranks)
    _check_shape("up", up, (d_model, total))
    _check_shape("stacked", stacked, (d_model + total, d_ff))
    _check_same(x, stacked=stacked, up=up)
    _check_frozen(stacked=stacked, up=up)
    if adapter:
        _check_adapter(x, d_model, adapter)
    if token_weights is not None:
        _check_shape("token_weights", token_weights, (batch, tokens))
        _check_device(x, token_weights=token_weights)


def _check_adapter(x: Tensor, d_model: int, adapter: Sequence[Tensor]) -> None:
    if len(adapter) != 4:
        raise OpsError(f"adapter: found {len(adapter)} tensors; needs down, its bias, up, its bias")
    names = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")
    inner = adapter[0].shape[0]
    shapes = ((inner, d_model), (inner,), (d_model, inner), (d_model,))
    for name, tensor, shape in zip(names, adapter, shapes, strict=True):
        _check_shape(name, tensor, shape)
        _check_same(x, **{name: tensor})


def check_gates(x: Tensor, gates: Tensor, experts: int) -> None:
    """Raise OpsError unless these are the gates of so many experts for each sample of x."""
    _check_dims(gates=(gates, 2))
    _check_shape("gates", gates, (len(x), experts))
    _check_device(x, gates=gates)


def check_gate(x: Tensor, gate: Tensor, context: Tensor | int, experts: int) -> None:
    """Raise OpsError unless these are a gate over so many experts and what it reads of each sample of x."""
    _check_dims(gate=(gate, 2))
    if isinstance(context, Tensor):
        _check_dims(context=(context, 2))
        _check_shape("context", context, (len(x), len(gate)))
        _check_device(x, context=context)
    else:
        check_prompt(x, context)
    width = len(gate) if isinstance(context, Tensor) else x.shape[2]
    _check_shape("gate", gate, (width, experts))
    _check_device(x, gate=gate)


def check_prompt(x: Tensor, prompt_length: int) -> None:
    """Raise OpsError unless these are arguments of `prompt_mean`."""
    _check_dims(x=(x, 3))
    if not 1 <= prompt_length <= x.shape[1]:
        raise OpsError(f"prompt_length: found {prompt_length}; needs 1 to {x.shape[1]}, x's tokens")


def check_factors(down: Tensor, up: Tensor, scales: Sequence[float], ranks: Sequence[int]) -> None:
    """Raise OpsError unless these are the factors of experts side by side."""
    _check_experts(scales, ranks)
    _check_dims(down=(down, 2), up=(up, 2))
    _check_shape("down", down, (sum(ranks), down.shape[1]))
    _check_shape("up", up, (up.shape[0], sum(ranks)))


def _check_experts(scales: Sequence[float], ranks: Sequence[int]) -> None:
    if len(ranks) == 0:
        raise OpsError("ranks: is empty; give one rank per expert, at least one expert")
    if len(ranks) > MAX_EXPERTS:
        raise OpsError(f"ranks: found {len(ranks)} experts; at most {MAX_EXPERTS} can be mixed")
    if min(ranks) < 1:
        raise OpsError(f"ranks: found {list(ranks)}; every rank must be at least 1")
    if len(scales) != len(ranks):
        raise OpsError(f"scales: found {len(scales)} for {len(ranks)} ranks; give one per expert")


def _check_dims(**tensors: tuple[Tensor, int]) -> None:
    for name, (tensor, dims) in tensors.items():
        if tensor.dim() != dims:
            raise OpsError(f"{name}: found {tensor.dim()} dimensions; needs {dims}")
        if not tensor.is_floating_point():
            raise OpsError(f"{name}: found dtype {tensor.dtype}; needs a floating-point one")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise OpsError(f"{name}: found shape {tuple(tensor.shape)}; needs {shape}")


def _check_same(x: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.dtype != x.dtype:
            raise OpsError(f"{name}: found dtype {tensor.dtype}; needs {x.dtype} as x")
    _check_device(x, **others)


def _check_device(x: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise OpsError(f"{name}: is on {tensor.device}; needs {x.device} as x")


def _check_frozen(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise OpsError(
                f"{name}: requires grad, but it is frozen here and would get no gradient;"
                f" call {name}.requires_grad_(False)"
            )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions, norms and cosines: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
