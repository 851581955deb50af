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

T5_BASE = {"batch": 2, "tokens": 64, "d_ff": 3072, "d_model": 768, "ranks": (64,) * 6, "inner": 0}
SIZES = {"published": T5_BASE, "64 experts": {**T5_BASE, "ranks": (16,) * 64}}


def loop_layer(case: Case, x: Tensor, gates: Tensor) -> Tensor:
    frozen = (case.weight, case.down, case.up)
    _, loss = reference.ffn_output(x, *frozen, gates, case.adapter, case.scales, case.ranks)
    return loss


def ops_layer(case: Case, x: Tensor, gates: Tensor) -> Tensor:
    _, loss = ops.ffn_output(
        x, case.stacked, case.up, gates, case.scales, case.ranks, adapter=case.adapter
    )
    assert loss is not None
    return loss


def saved_floats_per_token(layer: Callable[..., Tensor], case: Case) -> float:
    """Floats that autograd keeps for the backward pass, each storage once, frozen weights aside."""
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (case.weight, case.down, case.up, case.stacked)
    }
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
    assert case.stacked.nbytes > x.nbytes  # made here, and kept
    largest = max(allocations(lambda: ops_layer(case, x, gates).backward()))
    # dx is the one large thing that must be there
    assert x.nbytes <= largest <= x.nbytes + 64
    assert x.numel() < len(case.ranks) * x.shape[0] * x.shape[1] * case.weight.shape[0]


def test_frozen_weights_may_be_away_between_forward_and_backward(implementation):
    """ZeRO-3 frees a parameter's data after the forward pass and gathers it before the backward."""
    case = make_case(dtype=torch.float32)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    frozen = [
        torch.nn.Parameter(value.clone(), requires_grad=False) for value in (case.stacked, case.up)
    ]
    away = [torch.nn.Parameter(torch.empty(0), requires_grad=False) for _ in frozen]
    for parameter, value in zip(away, frozen, strict=True):
        parameter.data = value.data

    def total(stacked: Tensor, up: Tensor) -> Tensor:
        z, loss = ops.ffn_output(
            x, stacked, up, gates, case.scales, case.ranks, adapter=case.adapter
        )
        assert loss is not None
        return loss + z.sum()

    expected = torch.autograd.grad(total(*frozen), (x, gates))
    objective = total(*away)
    for parameter in away:
        parameter.data = torch.empty(0)
    for parameter, value in zip(away, frozen, strict=True):
        parameter.data = value.data.clone()
    found = torch.autograd.grad(objective, (x, gates))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
