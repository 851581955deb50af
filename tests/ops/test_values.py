"""The ops give the reference's numbers: every dtype, odd shapes and strides, same bits twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from pemt import ops
from pemt.ops import reference
from tests.ops.op_cases import make_case, relative_error, results

SHAPES = {
    "plain": {"batch": 3, "tokens": 7, "ranks": (4, 4, 4)},
    "one expert": {"ranks": (8,)},
    "eight experts": {"ranks": (1, 2, 3, 4, 5, 6, 7, 8)},
    "mixed ranks": {"d_ff": 70, "d_model": 45, "ranks": (128, 1, 17, 64)},
    "one sample": {"batch": 1, "tokens": 33, "ranks": (16, 16)},
    "one token": {"batch": 5, "tokens": 1, "ranks": (3, 9)},
    "one of each": {"batch": 1, "tokens": 1, "d_ff": 1, "d_model": 1, "ranks": (1,)},
    "odd sizes": {"batch": 3, "tokens": 67, "d_ff": 37, "d_model": 129, "ranks": (31, 65, 9)},
    "masked": {"batch": 3, "tokens": 50, "ranks": (8, 8), "mask": True},
}
WIDE = {"batch": 4, "tokens": 40, "d_ff": 256, "d_model": 128, "ranks": (64, 64, 32)}
ROUNDED_SHAPES = {
    "all tokens": WIDE,
    "masked": {**WIDE, "mask": True},
    "mixed ranks": SHAPES["mixed ranks"],
    "odd sizes": SHAPES["odd sizes"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_reference_in_float64(implementation, shape):
    case = make_case(**SHAPES[shape])
    expected, found = results(case, through="reference"), results(case, through="ops")
    for name, value in expected.items():
        # one token may have a zero gradient: the cosine of two numbers is a constant
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ROUNDED_SHAPES)
def test_error_is_at_most_twice_that_of_pytorch(implementation, dtype, shape):
    case = make_case(**ROUNDED_SHAPES[shape], dtype=dtype)
    truth = results(case.to(torch.float64), through="reference")
    composed = results(case, through="reference")
    found = results(case, through="ops")
    for name, exact in truth.items():
        # A mean over tokens can come out exact by luck: hold it to the error of what it averages.
        source = "cosines" if name in ("loss", "sparsity_dgates") else name
        allowed = 2 * relative_error(composed[source], truth[source])
        assert relative_error(found[name], exact) <= allowed, name
        assert found[name].dtype == composed[name].dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gram_matrix_keeps_its_precision(implementation, dtype, monkeypatch):
    """Outputs far smaller than what they are the sum of, where the Gram identity is at its worst."""
    case = make_case(batch=2, tokens=40, d_ff=256, d_model=128, ranks=(64, 64), dtype=dtype)
    case.down[1::2] = (0.2 * case.down[1::2] - case.down[::2]).to(dtype)
    case.up[:, 1::2] = (0.2 * case.up[:, 1::2] + case.up[:, ::2]).to(dtype)
    latent, z = linear(case.x, case.down), linear(case.x, case.weight)
    experts, gram = (case.scales, case.ranks), ops.gram_matrix(case.up, case.ranks)
    truth = reference.expert_cosines(z.double(), latent.double(), case.up.double(), *experts)

    def error() -> float:
        arguments = (z, latent, case.up, gram, case.gates, *experts, None)
        _, _, stats, _ = torch.ops.pemt.task_sparsity(*arguments)
        return relative_error(stats[..., :2], truth)

    found = error()
    monkeypatch.setenv("PEMT_OPS", "packed")  # has the Gram matrix in float32
    assert found <= 1.1 * error()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_with_and_without_onednn(monkeypatch):
    monkeypatch.setenv("PEMT_OPS", "cpu")
    case = make_case(**WIDE, dtype=torch.float32)
    found = results(case, through="ops")
    with torch.backends.mkldnn.flags(enabled=False):
        plain = results(case, through="ops")
    assert not torch.equal(found["y"], plain["y"]), "one of the two did not run"
    for name, value in plain.items():
        assert relative_error(found[name], value) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(implementation, dtype):
    case = make_case(batch=3, tokens=6, mask=True, dtype=dtype)
    strided = replace(
        case,
        x=case.x.transpose(0, 1).contiguous().transpose(0, 1),
        weight=case.weight.T.contiguous().T,
        down=torch.stack([case.down, case.down], dim=-1)[..., 0],
        up=case.up.T.contiguous().T,
        gates=case.gates.T.contiguous().T,
    )
    assert not strided.x.is_contiguous()
    assert not strided.down.is_contiguous()
    plain, found = results(case, through="ops"), results(strided, through="ops")
    for name, value in plain.items():  # other strides may take another path: other roundings
        assert relative_error(found[name], value) <= 4 * torch.finfo(dtype).eps, name

    assert case.mask is not None
    y, latent = ops.expert_mixture(*case.mixture)
    up, gram, experts = case.up, ops.gram_matrix(case.up, case.ranks), (case.scales, case.ranks)
    expected = ops.task_sparsity(y, latent, up, gram, case.gates, *experts, case.mask)
    y, latent = (each.mT.contiguous().mT for each in (y, latent))
    gram, mask = gram.T.contiguous().T, case.mask.T.contiguous().T
    assert not any(each.is_contiguous() for each in (y, latent, gram, mask))
    loss = ops.task_sparsity(y, latent, strided.up, gram, strided.gates, *experts, mask)
    assert relative_error(loss, expected) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=["no sample", "no token"])
def test_an_empty_batch_gives_zero_and_no_nan(implementation, shape):
    case = make_case(batch=shape[0], tokens=shape[1], dtype=torch.float32)
    found = results(case, through="ops")
    assert found["y"].shape == (*shape, 16)
    assert found["latent"].shape == (*shape, 8)
    assert found["loss"] == 0
    assert all(value.isfinite().all() for value in found.values())


def test_a_mask_without_a_token_gives_zero(implementation):
    case = make_case(mask=True)
    assert case.mask is not None
    found = results(replace(case, mask=torch.zeros_like(case.mask)), through="ops")
    assert found["loss"] == 0
    assert found["dz"].abs().max() == 0


def test_zero_outputs_have_the_cosine_of_pytorch(implementation):
    """A zero token and a zero expert: torch's eps decides, in value and gradient."""
    case = make_case(batch=2, tokens=3, ranks=(2, 3))
    case.x[0, 1] = 0
    case.up[:, :2] = 0
    expected, found = results(case, through="reference"), results(case, through="ops")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert expected["dlatent"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(implementation, dtype):
    case = make_case(batch=8, tokens=40, d_ff=192, d_model=96, ranks=(32,) * 6, dtype=dtype)
    first, second = results(case, through="ops"), results(case, through="ops")
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_gram_matrix_holds_one_square_per_expert():
    case = make_case(ranks=(2, 3))
    gram = ops.gram_matrix(case.up, case.ranks)
    assert gram.shape == (5, 16)
    torch.testing.assert_close(gram[2:, :3], case.up[:, 2:].T @ case.up[:, 2:])
    assert gram[:2, 2:].abs().max() == 0
