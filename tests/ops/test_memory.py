"""What the ops keep and allocate, and that frozen weights may come and go (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pemt import ops
from pemt.ops import reference
from tests.ops.op_cases import Case, make_case
from tests.support.allocations import allocations

T5_BASE = {"batch": 2, "tokens": 64, "d_ff": 3072, "d_model": 768, "ranks": (64,) * 6}
SIZES = {"published": T5_BASE, "64 experts": {**T5_BASE, "ranks": (16,) * 64}}


def loop_layer(case: Case, x: Tensor, gates: Tensor) -> Tensor:
    z, latent = reference.expert_mixture(
        x, case.weight, case.down, case.up, gates, case.scales, case.ranks
    )
    return reference.task_sparsity(z, latent, case.up, gates, case.scales, case.ranks)


def ops_layer(case: Case, x: Tensor, gates: Tensor) -> Tensor:
    z, latent = ops.expert_mixture(
        x, case.weight, case.down, case.up, gates, case.scales, case.ranks
    )
    return ops.task_sparsity(z, latent, case.up, gates, case.scales, case.ranks)


def saved_floats_per_token(layer: Callable[..., Tensor], case: Case) -> float:
    """Floats that autograd keeps for the backward pass, each storage once, frozen weights aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (case.weight, case.down, case.up)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x, gates = case.x.detach().requires_grad_(), case.gates.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = layer(case, x, gates)
    floats = sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())
    loss.backward()
    return floats / (x.shape[0] * x.shape[1])


@pytest.mark.parametrize("sizes", SIZES)
def test_a_tenth_of_the_loop_is_kept_for_backward(implementation, sizes):
    case = make_case(**SIZES[sizes], dtype=torch.float32)
    loop, ours = saved_floats_per_token(loop_layer, case), saved_floats_per_token(ops_layer, case)
    tokens, total, d_model, experts = 128, sum(case.ranks), 768, len(case.ranks)
    by_count = 2 * total + d_model + 2 * experts + 1  # latent and projection, z, norms and cosines
    constants = (2 * experts + experts) / tokens  # gates, mean distances
    assert by_count <= ours <= by_count + constants + 1
    assert loop >= 10 * ours


@pytest.mark.parametrize("sizes", SIZES)
def test_nothing_of_size_experts_by_tokens_by_width_is_allocated(implementation, sizes):
    case = make_case(**SIZES[sizes], dtype=torch.float32)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    largest = max(allocations(lambda: ops_layer(case, x, gates).backward()))
    # dx is the one large thing that must be there
    assert x.nbytes <= largest <= x.nbytes + 64
    assert x.numel() < len(case.ranks) * x.shape[0] * x.shape[1] * case.weight.shape[0]


def test_frozen_weights_may_be_away_between_forward_and_backward(implementation):
    """ZeRO-3 frees a parameter's data after the forward pass and gathers it before the backward."""
    case = make_case(dtype=torch.float32)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    frozen = [
        torch.nn.Parameter(value.clone(), requires_grad=False)
        for value in (case.weight, case.down, case.up)
    ]
    away = [torch.nn.Parameter(torch.empty(0), requires_grad=False) for _ in frozen]
    for parameter, value in zip(away, frozen, strict=True):
        parameter.data = value.data

    def loss(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        z, latent = ops.expert_mixture(x, weight, down, up, gates, case.scales, case.ranks)
        return ops.task_sparsity(z, latent, up, gates, case.scales, case.ranks) + z.sum()

    expected = torch.autograd.grad(loss(*frozen), (x, gates))
    total = loss(*away)
    for parameter in away:
        parameter.data = torch.empty(0)
    for parameter, value in zip(away, frozen, strict=True):
        parameter.data = value.data.clone()
    found = torch.autograd.grad(total, (x, gates))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
