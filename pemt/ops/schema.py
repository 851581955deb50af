"""The four `torch.library` ops, their fake implementations and their autograd.

The ops are opaque to torch.compile; which code runs inside them is chosen in `select`.
B batch, S tokens, F d_ff, D d_model, K experts, T the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import compute_dtype
from .products import choose_libraries
from .select import kernels_for

_EXPERTS = "Tensor gates, float[] scales, int[] ranks"
_SPARSITY = f"Tensor z, Tensor latent, Tensor up, {_EXPERTS}, Tensor? token_weights"
_SCHEMAS = {
    "expert_mixture": f"(Tensor x, Tensor weight, Tensor down, Tensor up, {_EXPERTS})"
    " -> (Tensor, Tensor)",
    "expert_mixture_backward": "(Tensor dy, Tensor? dlatent, Tensor latent, Tensor weight,"
    f" Tensor down, Tensor up, {_EXPERTS}, bool need_dx) -> (Tensor, Tensor)",
    "task_sparsity": f"({_SPARSITY}) -> (Tensor, Tensor, Tensor, Tensor)",
    "task_sparsity_backward": f"(Tensor grad, {_SPARSITY}, Tensor projection, Tensor stats,"
    " Tensor distance) -> (Tensor, Tensor, Tensor)",
}

Weights = tuple[tuple[int, int, bool], ...]


def mixture_products(x: Tensor, weight: Tensor, down: Tensor, *_: Any) -> Weights:
    """I, O and `transposed` of the frozen weights that the mixture multiplies with, forward and backward."""
    (d_model, d_ff), total = weight.shape, len(down)
    forward = (d_ff, d_model, True), (d_ff, total, True)
    return *forward, (d_model, total, False), (d_model, d_ff, False)


def sparsity_products(z: Tensor, latent: Tensor, *_: Any) -> Weights:
    """As `mixture_products`, of the loss."""
    return ((z.shape[-1], latent.shape[-1], False),)


PRODUCTS: dict[str, Callable[..., Weights]] = {
    "expert_mixture": mixture_products,
    "task_sparsity": sparsity_products,
}


def _define(name: str) -> None:
    def run(first: Tensor, *rest: Any) -> Any:
        kernels = kernels_for(rest[0] if first.dim() == 0 else first)
        if name in PRODUCTS:
            choose_libraries(kernels, first, *PRODUCTS[name](first, *rest))
        with torch.autocast(first.device.type, enabled=False):
            return getattr(kernels, name)(first, *rest)

    torch.library.define(f"pemt::{name}", _SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"pemt::{name}", "default", run)


for _name in _SCHEMAS:
    _define(_name)


@torch.library.register_fake("pemt::expert_mixture")
def _(x, weight, down, up, gates, scales, ranks):  # type: ignore[no-untyped-def]
    batch, tokens, _ = x.shape
    return x.new_empty(batch, tokens, weight.shape[0]), x.new_empty(batch, tokens, down.shape[0])


@torch.library.register_fake("pemt::expert_mixture_backward")
def _(dy, dlatent, latent, weight, down, up, gates, scales, ranks, need_dx):  # type: ignore[no-untyped-def]
    shape = (*dy.shape[:2], weight.shape[1]) if need_dx else (0,)
    return dy.new_empty(shape), torch.empty_like(gates, memory_format=torch.contiguous_format)


@torch.library.register_fake("pemt::task_sparsity")
def _(z, latent, up, gates, scales, ranks, token_weights):  # type: ignore[no-untyped-def]
    precise, experts = compute_dtype(z.dtype), len(ranks)
    return (
        z.new_empty((), dtype=precise),
        latent.new_empty(latent.shape),
        z.new_empty((*z.shape[:2], 2 * experts + 1), dtype=precise),
        z.new_empty((experts,), dtype=precise),
    )


@torch.library.register_fake("pemt::task_sparsity_backward")
def _(grad, z, latent, up, gates, *rest):  # type: ignore[no-untyped-def]
    return z.new_empty(z.shape), latent.new_empty(latent.shape), gates.new_empty(gates.shape)


def _save_mixture(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, down, up, gates, ctx.scales, ctx.ranks = inputs
    ctx.save_for_backward(output[1], weight, down, up, gates)
    ctx.set_materialize_grads(False)


def _mixture_backward(ctx: Any, dy: Tensor | None, dlatent: Tensor | None) -> tuple[Any, ...]:
    _check_first_derivative()
    latent, weight, down, up, gates = ctx.saved_tensors
    if dy is None:  # only the latent was used
        dy = latent.new_zeros(*latent.shape[:2], weight.shape[0])
    dx, dgates = torch.ops.pemt.expert_mixture_backward(
        dy, dlatent, latent, weight, down, up, gates, ctx.scales, ctx.ranks, ctx.needs_input_grad[0]
    )
    return (dx if ctx.needs_input_grad[0] else None), None, None, None, dgates, None, None


def _save_sparsity(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, latent, up, gates, ctx.scales, ctx.ranks, token_weights = inputs
    ctx.save_for_backward(z, latent, up, gates, token_weights, *output[1:])
    ctx.set_materialize_grads(False)


def _sparsity_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    _check_first_derivative()
    z, latent, up, gates, token_weights, *stats = ctx.saved_tensors
    dz, dlatent, dgates = torch.ops.pemt.task_sparsity_backward(
        grad, z, latent, up, gates, ctx.scales, ctx.ranks, token_weights, *stats
    )
    return dz, dlatent, None, dgates, None, None, None


def _check_first_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError("pemt.ops: there is no second derivative; use create_graph=False")


torch.library.register_autograd(
    "pemt::expert_mixture", _mixture_backward, setup_context=_save_mixture
)
torch.library.register_autograd(
    "pemt::task_sparsity", _sparsity_backward, setup_context=_save_sparsity
)
