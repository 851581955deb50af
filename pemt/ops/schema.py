"""The two `torch.library` ops, their fake implementations and their autograd.

The ops are opaque to torch.compile; which code runs inside them is chosen in `select`.
B batch, S tokens, F d_ff, D d_model, H the adapter's inner width, K experts, T the sum of the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import packed
from .products import choose_libraries
from .select import kernels_for

_EXPERTS = "float[] scales, int[] ranks, Tensor? token_weights"
_FROZEN = "Tensor stacked, Tensor up, Tensor gates"
_SCHEMAS = {
    "ffn_output": f"(Tensor x, {_FROZEN}, Tensor? adapter_down, Tensor? adapter_down_bias,"
    f" Tensor? adapter_up, Tensor? adapter_up_bias, {_EXPERTS}, bool sparsity)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "ffn_output_backward": "(Tensor? dz, Tensor? dloss, Tensor z, Tensor mixed, Tensor hidden,"
    f" Tensor active, Tensor projection, Tensor stats, Tensor distance, {_FROZEN},"
    f" Tensor? adapter_down, Tensor? adapter_up, {_EXPERTS}, bool need_dx)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


def products(stacked: Tensor, up: Tensor, *, adapted: bool) -> tuple[tuple[int, int, bool], ...]:
    """I, O and `transposed` of the frozen weights that the op multiplies with, forward and backward."""
    (rows, d_ff), (d_model, total) = stacked.shape, up.shape
    forward, back = ([rows], rows) if adapted else ([d_model, total], d_model)
    return (*((d_ff, each, True) for each in forward), (d_model, total, False), (back, d_ff, False))


def _forward(x: Tensor, stacked: Tensor, up: Tensor, *rest: Any) -> Any:
    kernels = kernels_for(x)
    choose_libraries(kernels, x, *products(stacked, up, adapted=rest[1] is not None))
    with torch.autocast(x.device.type, enabled=False):
        return kernels.ffn_output(x, stacked, up, *rest)


def _backward(dz: Tensor | None, dloss: Tensor | None, z: Tensor, mixed: Tensor, *rest: Any) -> Any:
    with torch.autocast(mixed.device.type, enabled=False):
        return kernels_for(mixed).ffn_output_backward(dz, dloss, z, mixed, *rest)


_BODIES: dict[str, Callable[..., Any]] = {"ffn_output": _forward, "ffn_output_backward": _backward}
for _name, _body in _BODIES.items():
    torch.library.define(f"pemt::{_name}", _SCHEMAS[_name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"pemt::{_name}", "default", _body)


def _fake(body: Callable[..., Any]) -> Callable[..., Any]:
    """What `packed` makes of tensors without values: every implementation's outputs have its shapes and dtypes."""

    @functools.wraps(body)
    def fake(*arguments: Any) -> Any:
        with torch.no_grad(), torch._C._DisableAutocast():
            return body(*arguments)

    return fake


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *frozen, gates, adapter_down, _, adapter_up, _, scales, ranks, weights, sparsity = inputs
    ctx.scales, ctx.ranks, ctx.sparsity = scales, ranks, sparsity
    z = output[0] if sparsity else None
    ctx.save_for_backward(z, *output[2:], *frozen, gates, adapter_down, adapter_up, weights)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dz: Tensor | None, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if not ctx.sparsity:  # what stands in the loss's place is nothing
        dloss = None
    if dz is None and dloss is None:
        return (None,) * 12
    if torch.is_grad_enabled():
        raise NotImplementedError("pemt.ops: there is no second derivative; use create_graph=False")
    z, mixed, *kept, token_weights = ctx.saved_tensors
    z = mixed.new_empty(0) if z is None else z
    need_dx, adapted = ctx.needs_input_grad[0], kept[-1] is not None
    dx, dgates, *adapter = torch.ops.pemt.ffn_output_backward(
        dz, dloss, z, mixed, *kept, ctx.scales, ctx.ranks, token_weights, need_dx
    )
    of_adapter = adapter if adapted else [None] * 4
    return dx if need_dx else None, None, None, dgates, *of_adapter, *(None,) * 4


torch.library.register_fake("pemt::ffn_output", _fake(packed.ffn_output))
torch.library.register_fake("pemt::ffn_output_backward", _fake(packed.ffn_output_backward))
torch.library.register_autograd("pemt::ffn_output", _gradients, setup_context=_save)
