"""The ops as citizens of PyTorch: opcheck, gradcheck, compile, checkpointing, autocast, errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pemt import ops
from pemt.ops import OpsError
from tests.ops.op_cases import Case, make_case, results

TENSORS = ("x", "weight", "down", "up", "gates", "mask")
MIXED = {"batch": 2, "tokens": 3, "d_ff": 7, "d_model": 6, "ranks": (2, 3, 1)}


def layer_loss(case: Case, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    gates = gates * ops.prompt_mean(x, 2).to(gates.dtype).sum(dim=-1, keepdim=True)
    # The loss last, so that the first in the backward pass: a checkpoint is then recomputed from within it.
    z, loss = case.output(x, gates)
    return z.square().mean() + loss


@pytest.mark.parametrize(
    ("inner", "mask"),
    [
        pytest.param(0, False, id="no adapter-all tokens"),
        pytest.param(2, True, id="adapter-masked"),
        pytest.param(0, True, id="no adapter-masked", marks=pytest.mark.soak),
        pytest.param(2, False, id="adapter-all tokens", marks=pytest.mark.soak),
    ],
)
def test_gradcheck(implementation, mask, inner):
    case = make_case(batch=2, tokens=2, d_ff=3, d_model=3, ranks=(2, 1), mask=mask, inner=inner)
    inputs = [each.requires_grad_() for each in (case.x, case.gates, *case.adapter)]

    def output(x, gates, *adapter):
        return replace(case, adapter=adapter).output(x, gates)

    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradcheck(lambda *each: output(*each)[0], inputs)
    assert torch.autograd.gradcheck(lambda *each: output(*each)[1], inputs)


def test_a_second_derivative_is_refused(implementation):
    case = make_case()
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    z, loss = case.output()
    for result in (z.sum(), loss):
        with pytest.raises(NotImplementedError, match="there is no second derivative"):
            torch.autograd.grad(result, (x, gates), create_graph=True)


def test_past_schema_or_through_it_the_bits_are_the_same(implementation, monkeypatch):
    case = make_case(**MIXED, mask=True, dtype=torch.float32)
    case.x.requires_grad_()
    z, _ = case.output()
    compiled = implementation in ("cpu", "cuda on the host")
    assert ("pemt::" in z.grad_fn.name()) == compiled
    eager = results(case, through="ops")
    monkeypatch.setattr(ops, "_direct", lambda tensor: None)
    registered = results(case, through="ops")
    assert all(torch.equal(eager[name], registered[name]) for name in eager)


def test_fake_tensors_have_the_same_shapes(implementation):
    case = make_case(**MIXED, mask=True, dtype=torch.float32)
    real = results(case, through="ops")
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(getattr(case, name)) for name in TENSORS}
        fakes["adapter"] = tuple(mode.from_tensor(each) for each in case.adapter)
        fake = results(replace(case, **fakes), through="ops")
    assert {name: value.shape for name, value in fake.items()} == {
        name: value.shape for name, value in real.items()
    }


def test_selective_checkpointing_sees_the_ops_and_not_what_is_inside(implementation):
    """What it keeps of the first pass it hands out in the second, and a kernel would read what is not there."""
    products = (torch.ops.aten.mm.default, torch.ops.mkldnn._linear_pointwise.default)

    def policy(context, op, *args, **kwargs):
        kept = op in products
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    case = make_case(mask=True, dtype=torch.float32)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    plain = torch.autograd.grad(layer_loss(case, x, gates), (x, gates))
    loss = checkpoint(
        layer_loss, case, x, gates, use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )  # fmt: skip
    assert all(map(torch.equal, torch.autograd.grad(loss, (x, gates)), plain))


def test_the_backward_pass_can_be_compiled_by_itself(implementation):
    case = make_case(mask=True, dtype=torch.float32)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    plain = torch.autograd.grad(layer_loss(case, x, gates), (x, gates))
    loss = layer_loss(case, x, gates)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close((x.grad, gates.grad), plain)


@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(4, torch.bfloat16), pytest.param(0, torch.float32, marks=pytest.mark.soak)],
    ids=["adapter", "no adapter"],
)
def test_opcheck(implementation, inner, dtype):
    case = make_case(**MIXED, inner=inner, mask=True, dtype=dtype)
    for each in (case.x, case.gates, *case.adapter):
        each.requires_grad_()
    given = case.arguments
    torch.library.opcheck(torch.ops.pemt.ffn_output, given)
    torch.library.opcheck(torch.ops.pemt.ffn_output, (*given[:-1], False))
    with torch.no_grad():
        plain = [each.detach() if torch.is_tensor(each) else each for each in given]
        z, loss, *saved = torch.ops.pemt.ffn_output(*plain)
        _, *frozen, gates, adapter_down, _, adapter_up, _, scales, ranks, weights, _ = plain
        rest = (gates, adapter_down, adapter_up, scales, ranks, weights)
        backward = torch.ops.pemt.ffn_output_backward
        for dz, dloss in ((z, loss), (None, loss), (z, None)):
            given = (dz, dloss, z, *saved, *frozen, *rest, True)
            if dz is not None and dloss is not None:
                torch.library.opcheck(backward, given)
            else:  # tracing, most of opcheck's time, sees the same op
                torch.library.opcheck(
                    backward, given, test_utils=("test_schema", "test_faketensor")
                )


def test_gradient_only_where_it_is_asked_for(implementation):
    case = make_case()
    x = case.x.requires_grad_()
    case.output()[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(case.output()[0].sum(), x)[0])
    gates = case.gates.requires_grad_()
    z, loss = case.output(case.x.detach())
    assert not torch.autograd.grad(z.sum() + loss, gates)[0].isnan().any()
    assert all(each.grad is None for each in case.adapter)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiles_without_a_graph_break(implementation, backend):
    case = make_case(**MIXED, mask=True, dtype=torch.float32)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    compiled = torch.compile(layer_loss, fullgraph=True, backend=backend)
    plain, found = layer_loss(case, x, gates), compiled(case, x, gates)
    torch.testing.assert_close(found, plain)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, gates)), torch.autograd.grad(plain, (x, gates)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(implementation, use_reentrant):
    case = make_case(**MIXED, mask=True)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    plain = torch.autograd.grad(layer_loss(case, x, gates), (x, gates))
    checkpoint(layer_loss, case, x, gates, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(gates.grad, plain[1])


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_equals_casting_by_hand(implementation, backward_inside):
    case = make_case(batch=2, tokens=9, d_ff=64, d_model=32, dtype=torch.float32)

    def gradients(low: Case) -> tuple:
        x, gates = case.x.detach().requires_grad_(), case.gates.detach().requires_grad_()
        y, loss = low.output(x.to(low.x.dtype), gates)
        return y, loss, (x, gates)

    y, loss, inputs = gradients(case.to(torch.bfloat16))
    by_hand = torch.autograd.grad(loss + y.float().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_y, cast_loss, inputs = gradients(case)
        total = cast_loss + cast_y.float().sum()
        if backward_inside:
            found = torch.autograd.grad(total, inputs)
    if not backward_inside:
        found = torch.autograd.grad(total, inputs)
    assert cast_y.dtype == torch.bfloat16
    assert cast_loss.dtype == torch.float32
    assert torch.equal(cast_y, y)
    assert torch.equal(cast_loss, loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, by_hand, strict=True))


@pytest.mark.parametrize("name", ["stacked", "up"])
def test_a_trainable_expert_is_refused(name):
    case = make_case()
    getattr(case, name).requires_grad_()
    with pytest.raises(OpsError, match=rf"{name}: requires grad.*requires_grad_\(False\)"):
        case.output()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 24)}, "x: found 2 dimensions; needs 3"),
        ({"down": torch.zeros(7, 24)}, r"stacked: found shape \(23, 24\); needs \(24, 24\)"),
        ({"up": torch.zeros(16, 8).half()}, "up: found dtype torch.float16; needs torch.float32"),
        ({"adapter": (torch.zeros(3, 16),)}, "adapter: found 1 tensors; needs down, its bias"),
        (
            {"adapter": (torch.zeros(3, 15), *[torch.zeros(1)] * 3)},
            r"adapter_down: found shape \(3, 15\); needs \(3, 16\)",
        ),
        ({"mask": torch.ones(2, 4)}, r"token_weights: found shape \(2, 4\); needs \(2, 5\)"),
        ({"mask": torch.ones(2, 5, device="meta")}, "token_weights: is on meta; needs cpu as x"),
        ({"gates": torch.zeros(2, 3)}, r"gates: found shape \(2, 3\); needs \(2, 2\)"),
        ({"gates": torch.zeros(2, 2).int()}, "gates: found dtype torch.int32"),
        ({"gates": torch.zeros(2, 2, device="meta")}, "gates: is on meta; needs cpu as x"),
        ({"scales": [1.0]}, "scales: found 1 for 2 ranks"),
        ({"ranks": [8, 0]}, r"ranks: found \[8, 0\]"),
        ({"ranks": []}, "ranks: is empty"),
        ({"ranks": [1] * 129}, "ranks: found 129 experts; at most 128"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    case = replace(make_case(dtype=torch.float32), **change)
    with pytest.raises(OpsError, match=message):
        case.output()


def test_an_unknown_implementation_is_named(monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "tpu")
    with pytest.raises(OpsError, match="PEMT_OPS: found 'tpu'; use one of reference"):
        results(make_case(), through="ops")
