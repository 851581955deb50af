"""`gated_output`: the gates of a learned gate, made within the op, are those made before it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pemt import ops
from pemt.ops import OpsError
from tests.ops.op_cases import Case, make_case

PROMPT_LENGTH = 2
CONTEXTS = pytest.mark.parametrize("of_x", [True, False], ids=["mean of x", "context given"])


def gate_inputs(case: Case, *, of_x: bool) -> tuple[Tensor, Tensor | int]:
    """A gate [C,K], and what it reads."""
    generator = torch.Generator().manual_seed(1)
    width = case.x.shape[2] if of_x else 3
    gate = torch.randn(width, len(case.ranks), generator=generator, dtype=torch.float64)
    context = torch.randn(len(case.x), width, generator=generator, dtype=torch.float64)
    precise = torch.promote_types(case.x.dtype, torch.float32)
    return gate.to(case.x.dtype), PROMPT_LENGTH if of_x else context.to(precise)


def gated(
    case: Case, x: Tensor, gate: Tensor, context: Tensor | int, *adapter: Tensor, **options: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    weights = ops.token_weights(case.mask)
    experts = (case.scales, case.ranks)
    return ops.gated_output(
        x, case.stacked, case.up, gate, context, *experts,
        adapter=adapter, token_weights=weights, **options,
    )  # fmt: skip


def leaves(case: Case, *, of_x: bool) -> tuple[list[Tensor | int], list[Tensor]]:
    """All that a gradient reaches, in the op's order, and of it the tensors."""
    each = (case.x, *gate_inputs(case, of_x=of_x), *case.adapter)
    given = [one.detach().requires_grad_() if isinstance(one, Tensor) else one for one in each]
    return given, [one for one in given if isinstance(one, Tensor)]


def everything(case: Case, *, of_x: bool) -> tuple[Tensor, ...]:
    """z, the loss, the gates and the gradients of all that has one."""
    given, tensors = leaves(case, of_x=of_x)
    z, loss, gates = gated(case, *given)
    assert not gates.requires_grad
    weight_z = torch.cos(torch.arange(z.numel(), dtype=torch.float64)).view_as(z).to(z)
    total = (z * weight_z).sum() + loss
    return z, loss, gates, *torch.autograd.grad(total, tensors)


@CONTEXTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_gates_that_are_made_before(implementation, monkeypatch, dtype, of_x):
    case = make_case(mask=True, dtype=dtype)
    within = everything(case, of_x=of_x)
    monkeypatch.setattr(ops, "_direct", lambda tensor: None)
    before = everything(case, of_x=of_x)
    assert all(map(torch.equal, within, before))


@CONTEXTS
@pytest.mark.parametrize("inner", [0, 2], ids=["no adapter", "adapter"])
@pytest.mark.parametrize("implementation", ["packed", "cpu"], indirect=True)
def test_gradcheck(implementation, inner, of_x):
    case = make_case(batch=2, tokens=3, d_ff=3, d_model=3, ranks=(2, 1), inner=inner)
    given, _ = leaves(case, of_x=of_x)
    assert torch.autograd.gradcheck(lambda *each: gated(case, *each)[:2], given)
    assert torch.autograd.gradcheck(lambda *each: gated(case, *each)[1], given)
    assert torch.autograd.gradcheck(lambda *each: gated(case, *each, sparsity=False)[0], given)


@CONTEXTS
def test_a_gate_learns_where_x_wants_no_gradient(implementation, of_x):
    case = make_case()
    given, tensors = leaves(case, of_x=of_x)
    z, loss, _ = gated(case, *given)
    expected = torch.autograd.grad(z.sum() + loss, tensors[1:])
    z, loss, _ = gated(case, case.x, *given[1:])
    assert all(map(torch.equal, torch.autograd.grad(z.sum() + loss, tensors[1:]), expected))


def test_without_gradients_the_numbers_are_the_same(implementation):
    case = make_case()
    gate, context = gate_inputs(case, of_x=True)
    expected = gated(case, case.x, gate, context, *case.adapter)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert all(
                map(torch.equal, gated(case, case.x, gate, context, *case.adapter), expected)
            )


@pytest.mark.parametrize("implementation", ["cpu", "cuda on the host"], indirect=True)
def test_no_tensor_of_xs_size_is_made_for_the_prompts_mean(implementation, monkeypatch):
    case = make_case(tokens=40, dtype=torch.float32)

    def operators() -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            everything(case, of_x=True)
        return {event.name for event in profile.events()}

    assert "aten::slice_backward" not in operators()
    monkeypatch.setattr(ops, "_direct", lambda tensor: None)
    assert "aten::slice_backward" in operators()


@pytest.mark.parametrize(
    ("gate", "context", "message"),
    [
        (torch.zeros(24, 2), 0, "prompt_length: found 0; needs 1 to 5, x's tokens"),
        (torch.zeros(24, 2), 6, "prompt_length: found 6; needs 1 to 5"),
        (torch.zeros(23, 2), 2, r"gate: found shape \(23, 2\); needs \(24, 2\)"),
        (torch.zeros(24, 3), 2, r"gate: found shape \(24, 3\); needs \(24, 2\)"),
        (torch.zeros(24), 2, "gate: found 1 dimensions; needs 2"),
        (torch.zeros(7, 2), torch.zeros(2, 6), r"context: found shape \(2, 6\); needs \(2, 7\)"),
        (torch.zeros(7, 2), torch.zeros(3, 7), r"context: found shape \(3, 7\); needs \(2, 7\)"),
        (torch.zeros(7, 2, device="meta"), torch.zeros(2, 7), "gate: is on meta; needs cpu as x"),
    ],
)
def test_wrong_arguments_are_named(gate, context, message):
    case = make_case(dtype=torch.float32)
    gated(case, case.x, torch.zeros(24, 2), 2)
    for _ in range(2):  # what has been refused is not taken the second time, either
        with pytest.raises(OpsError, match=message):
            gated(case, case.x, gate, context)
