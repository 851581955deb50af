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
    x, prompt_BF = ops.prompt_mean(x, 2)
    gates = gates * prompt_BF.to(gates.dtype).sum(dim=-1, keepdim=True)
    y, latent = ops.expert_mixture(
        x, case.weight, case.down, case.up, gates, case.scales, case.ranks
    )
    z = y + torch.tanh(y)
    squares = z.square().mean()
    # The last, so that the first in the backward pass: a checkpoint is then recomputed from within it.
    sparsity = ops.task_sparsity(z, latent, case.up, gates, case.scales, case.ranks, case.mask)
    return squares + sparsity


@pytest.mark.parametrize("mask", [False, True], ids=["all tokens", "masked"])
def test_gradcheck(implementation, mask):
    case = make_case(batch=2, tokens=2, d_ff=3, d_model=3, ranks=(2, 1), mask=mask)
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, gates: ops.expert_mixture(
            x, case.weight, case.down, case.up, gates, case.scales, case.ranks
        ),
        (x, gates),
    )
    y, latent = ops.expert_mixture(*case.mixture)
    z, latent = y.detach().requires_grad_(), latent.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, latent, gates: ops.task_sparsity(
            z, latent, case.up, gates, case.scales, case.ranks, case.mask
        ),
        (z, latent, gates),
    )


def test_a_second_derivative_is_refused(implementation):
    case = make_case()
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    y, latent = ops.expert_mixture(*case.mixture)
    sparsity = ops.task_sparsity(y, latent, case.up, gates, case.scales, case.ranks)
    for result in (y.sum(), sparsity):
        with pytest.raises(NotImplementedError, match="there is no second derivative"):
            torch.autograd.grad(result, (x, gates), create_graph=True)


def test_past_schema_or_through_it_the_bits_are_the_same(implementation, monkeypatch):
    case = make_case(**MIXED, mask=True, dtype=torch.float32)
    case.x.requires_grad_()
    y, latent = ops.expert_mixture(*case.mixture)
    loss = ops.task_sparsity(y, latent, case.up, case.gates, case.scales, case.ranks)
    compiled = implementation in ("cpu", "cuda on the host")
    assert ("pemt::" in y.grad_fn.name(), "pemt::" in loss.grad_fn.name()) == (compiled, compiled)
    eager = results(case, through="ops")
    monkeypatch.setattr(ops, "_direct", lambda tensor: None)
    registered = results(case, through="ops")
    assert all(torch.equal(eager[name], registered[name]) for name in eager)


def test_fake_tensors_have_the_same_shapes(implementation):
    case = make_case(**MIXED, mask=True, dtype=torch.float32)
    real = results(case, through="ops")
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(getattr(case, name)) for name in TENSORS}
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(implementation, dtype):
    case = make_case(**MIXED, mask=True, dtype=dtype)
    experts = (case.gates.requires_grad_(), case.scales, case.ranks)
    frozen = (case.weight, case.down, case.up)
    mixture = torch.ops.pemt.expert_mixture
    torch.library.opcheck(mixture, (case.x.requires_grad_(), *frozen, *experts))
    y, latent = (value.detach() for value in mixture(case.x, *frozen, *experts))
    weights = case.mask / case.mask.sum()
    inputs = (
        y.clone().requires_grad_(),
        latent.clone().requires_grad_(),
        case.up,
        *experts,
        weights,
    )
    torch.library.opcheck(torch.ops.pemt.task_sparsity, inputs)
    with torch.no_grad():
        for dlatent in (None, latent):
            torch.library.opcheck(
                torch.ops.pemt.expert_mixture_backward,
                (y, dlatent, latent, *frozen, case.gates.detach(), case.scales, case.ranks, True),
            )
        _, *saved = torch.ops.pemt.task_sparsity(*inputs)
        plain = [value.detach() if torch.is_tensor(value) else value for value in inputs]
        torch.library.opcheck(
            torch.ops.pemt.task_sparsity_backward, (torch.ones(()), *plain, *saved)
        )


def test_gradient_only_where_it_is_asked_for(implementation):
    case = make_case()
    x = case.x.requires_grad_()
    y, _ = ops.expert_mixture(x, *case.mixture[1:])
    y.sum().backward()
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(ops.expert_mixture(*case.mixture)[0].sum(), x)[0]
    )
    gates = case.gates.requires_grad_()
    y, latent = ops.expert_mixture(
        case.x.detach(), case.weight, case.down, case.up, gates, case.scales, case.ranks
    )
    assert not torch.autograd.grad(y.sum(), gates)[0].isnan().any()
    # the latent alone: its gradient skips the mixture
    _, latent = ops.expert_mixture(*case.mixture)
    (dx,) = torch.autograd.grad(latent.sum(), x)
    torch.testing.assert_close(dx, case.down.sum(0).expand_as(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
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
        y, latent = ops.expert_mixture(
            x.to(low.x.dtype), low.weight, low.down, low.up, gates, low.scales, low.ranks
        )
        loss = ops.task_sparsity(y, latent, low.up, gates, low.scales, low.ranks)
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


@pytest.mark.parametrize("name", ["weight", "down", "up"])
def test_a_trainable_expert_is_refused(name):
    case = make_case()
    getattr(case, name).requires_grad_()
    with pytest.raises(OpsError, match=rf"{name}: requires grad.*requires_grad_\(False\)"):
        ops.expert_mixture(*case.mixture)


def test_a_trainable_expert_is_refused_by_the_sparsity():
    case = make_case()
    y, latent = ops.expert_mixture(*case.mixture)
    up = case.up.requires_grad_()
    with pytest.raises(OpsError, match=r"up: requires grad.*requires_grad_\(False\)"):
        ops.task_sparsity(y, latent, up, case.gates, case.scales, case.ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 24)}, "x: found 2 dimensions; needs 3"),
        ({"weight": torch.zeros(16, 23)}, r"weight: found shape \(16, 23\); needs \(16, 24\)"),
        (
            {"down": torch.zeros(8, 24).half()},
            "down: found dtype torch.float16; needs torch.float32",
        ),
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
        ops.expert_mixture(*case.mixture)


def test_wrong_arguments_of_the_sparsity_are_named():
    case = make_case(dtype=torch.float32)
    y, latent = ops.expert_mixture(*case.mixture)
    rest = (case.gates, case.scales, case.ranks)
    with pytest.raises(OpsError, match=r"mask: found shape \(2, 4\); needs \(2, 5\)"):
        ops.task_sparsity(y, latent, case.up, *rest, mask=torch.ones(2, 4))
    with pytest.raises(OpsError, match="mask: is on meta; needs cpu as z"):
        ops.task_sparsity(y, latent, case.up, *rest, mask=torch.ones(2, 5, device="meta"))


@pytest.mark.parametrize("prompt_length", [0, 6])
def test_a_prompt_that_is_not_in_x_is_named(prompt_length):
    with pytest.raises(OpsError, match=f"prompt_length: found {prompt_length}; needs 1 to 5"):
        ops.prompt_mean(make_case().x, prompt_length)


def test_an_unknown_implementation_is_named(monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "tpu")
    with pytest.raises(OpsError, match="PEMT_OPS: found 'tpu'; use one of reference"):
        results(make_case(), through="ops")
