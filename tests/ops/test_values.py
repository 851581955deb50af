"""The ops give the reference's numbers: every dtype, odd shapes and strides, same bits twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pemt import ops
from pemt.ops import orthonormal, reference
from tests.ops.op_cases import allowed_error, make_case, relative_error, results

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
    "no adapter": {"batch": 3, "tokens": 7, "ranks": (4, 3), "inner": 0, "mask": True},
    "sixty-four experts": {
        "tokens": 9,
        "d_ff": 40,
        "d_model": 24,
        "ranks": (16,) * 64,
        "mask": True,
    },
    "as many as can be": {"tokens": 3, "ranks": (1, 2) * 64},
}
WIDE = {"batch": 4, "tokens": 40, "d_ff": 256, "d_model": 128, "ranks": (64, 64, 32)}
ROUNDED_SHAPES = {
    "all tokens": WIDE,
    "masked": {**WIDE, "mask": True},
    "mixed ranks": SHAPES["mixed ranks"],
    "odd sizes": SHAPES["odd sizes"],
    "sixty-four experts": {**WIDE, "batch": 2, "tokens": 12, "ranks": (16,) * 64},
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
    case = make_case(**ROUNDED_SHAPES[shape], inner=32, dtype=dtype)
    truth = results(case.to(torch.float64), through="reference")
    composed = results(case, through="reference")
    found = results(case, through="ops")
    for name, exact in truth.items():
        assert relative_error(found[name], exact) <= allowed_error(name, composed, truth), name
        assert found[name].dtype == composed[name].dtype, name


def raw_experts(kind: str, d_model: int, d_ff: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """down [T,F] and up [D,T] of three experts as a bank may hold them."""
    ranks = [64, 64, 64] if kind != "rank above d_model" else [d_model + 40, 8, d_model]
    down, up = torch.randn(sum(ranks), d_ff) / d_ff**0.5, torch.randn(d_model, sum(ranks))
    if kind == "cancelling ranks":  # outputs far smaller than what they are the sum of
        down[1::2] = 0.02 * down[1::2] - down[::2]
        up[:, 1::2] = 0.02 * up[:, 1::2] + up[:, ::2]
    elif kind == "zero":
        up[:, : ranks[0]] = 0
    elif kind.startswith("std"):
        up *= float(kind.removeprefix("std "))
    return down, up, ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "d_model"),
    [
        *((kind, 96) for kind in ("std 1e-5", "std 1e-2", "std 1", "std 10", "std 100")),
        *((kind, 96) for kind in ("cancelling ranks", "zero", "rank above d_model")),
        *(("std 1e-5", 1024), ("std 100", 1024)),  # what a width changes: sums that are larger
    ],
)
def test_experts_of_any_size_and_rank(implementation, dtype, d_model, kind):
    """Held against the factors as they are in the bank: splitting anew costs nothing in half precision."""
    if d_model == 1024 and implementation == "cuda on the host":
        pytest.skip("the same as with 96, at length")
    torch.manual_seed(0)
    case = make_case(batch=16, tokens=4, d_ff=128, d_model=d_model, ranks=(1, 1, 1), inner=0)
    down, up, ranks = raw_experts(kind, d_model, 128)
    given = replace(case, down=down, up=up, ranks=ranks, scales=[1.0, 0.5, -2.0])
    # of PyTorch's error. In float32 the new factors are rounded as well: 1.5 on average, up to 5 in 12 draws
    factor = 8 if dtype == torch.float32 else 2
    exact = results(given.to(torch.float64), through="reference")
    composed = results(given.to(dtype), through="reference")
    down, up, scales, ranks = ops.orthonormal_experts(down, up, given.scales, ranks)
    ours = replace(given, down=down, up=up, scales=scales, ranks=ranks).to(dtype)
    found = results(ours, through="ops")
    for name, truth in exact.items():
        assert found[name].isfinite().all(), name
        # PyTorch's own is NaN in half precision where an expert has no output
        if name.startswith("sparsity") and composed[name].isnan().any():
            continue  # too small for float16 to have many bits for it, and nothing to be held against
        # a gate's gradient is a sum of both signs: 2.15 in one draw in half precision
        allowed_factor = max(factor, 4) if "dgates" in name else factor
        theirs = torch.nan_to_num(torch.tensor(relative_error(composed[name], truth)))
        theirs = allowed_factor * theirs
        allowed = max(float(theirs), 4 * torch.finfo(dtype).eps)
        assert relative_error(found[name], truth) <= allowed, name


def test_an_expert_split_anew_is_the_same_product():
    torch.manual_seed(0)
    for rows, rank in [(45, 17), (20, 33), (7, 7)]:
        down, up = torch.randn(rank, 30), 300 * torch.randn(rows, rank)
        up[:, 5] = up[:, 4]  # dependent columns
        new_down, new_up, scales, ranks = ops.orthonormal_experts(down, up, [0.5], [rank])
        assert ranks == [min(rows, rank)]
        torch.testing.assert_close(
            scales[0] * new_up @ new_down, 0.5 * up @ down, rtol=1e-5, atol=1e-2
        )
        squares = new_up.T @ new_up  # a projection on as many directions as the expert has
        torch.testing.assert_close(squares @ squares, squares, rtol=0, atol=1e-6)
        assert torch.diagonal(squares).sum().round() == min(rows, rank - 1)
        assert 0.1 < new_down.norm() / down.norm() < 10, "half precision holds what it held"


@pytest.mark.parametrize(
    "kind",
    ["independent", "a, a, b", "nearly dependent", "orthogonal", "zero", "rank above d_model"],
)
def test_both_factors_may_come_from_two_calls_that_round_differently(kind):
    """The model makes them one after the other, and under ZeRO-3 every rank makes its part of each."""
    torch.manual_seed(0)
    up_DR = torch.randn(20, 33 if kind == "rank above d_model" else 12, dtype=torch.float64)
    if kind == "a, a, b":
        up_DR[:, 1] = up_DR[:, 0]
    elif kind == "nearly dependent":
        up_DR[:, 1] = up_DR[:, 0] + 1e-11 * up_DR[:, 1]
    elif kind == "orthogonal":
        up_DR = torch.linalg.qr(up_DR)[0]  # singular values alike: any turn of their vectors
    elif kind == "zero":
        up_DR[:] = 0
    one_ulp = torch.finfo(torch.float64).eps * torch.randint(-1, 2, up_DR.shape)
    first, second = orthonormal.split(up_DR), orthonormal.split(up_DR * (1 + one_ulp))
    product = first.basis @ second.mix * second.size
    torch.testing.assert_close(product, up_DR, rtol=1e-13, atol=1e-13)


def test_an_expert_without_output_has_no_direction():
    down, up, scales, _ = ops.orthonormal_experts(
        torch.ones(4, 5), torch.zeros(6, 4), [1.0, 1.0], [2, 2]
    )
    assert not down.any()
    assert not up.any()
    assert scales == [1.0, 1.0]


def test_wrong_factors_are_named():
    with pytest.raises(ops.OpsError, match=r"up: found shape \(6, 3\); needs \(6, 4\)"):
        ops.orthonormal_experts(torch.ones(4, 5), torch.ones(6, 3), [1.0], [4])


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
        mask=case.mask.T.contiguous().T,
        adapter=tuple(torch.stack([each, each], dim=-1)[..., 0] for each in case.adapter),
    )
    vars(strided)["stacked"] = case.stacked.T.contiguous().T
    assert not strided.x.is_contiguous()
    assert not strided.down.is_contiguous()
    plain, found = results(case, through="ops"), results(strided, through="ops")
    for name, value in plain.items():  # other strides may take another path: other roundings
        assert relative_error(found[name], value) <= 4 * torch.finfo(dtype).eps, name


def test_the_mixture_alone_is_that_of_the_reference(implementation):
    case = make_case(batch=3, tokens=7, ranks=(4, 3))
    x, gates = case.x.requires_grad_(), case.gates.requires_grad_()
    experts = (gates, case.scales, case.ranks)
    expected, _ = reference.expert_mixture(x, case.weight, case.down, case.up, *experts)
    y = ops.ffn_output(x, case.stacked, case.up, *experts, sparsity=False)[0]
    torch.testing.assert_close(y, expected)
    dy = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    for found, truth in zip(
        torch.autograd.grad(y, (x, gates), dy), torch.autograd.grad(expected, (x, gates), dy),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=["no sample", "no token"])
def test_an_empty_batch_gives_zero_and_no_nan(implementation, shape):
    case = make_case(batch=shape[0], tokens=shape[1], dtype=torch.float32)
    found = results(case, through="ops")
    assert found["z"].shape == (*shape, 16)
    assert found["loss"] == 0
    assert all(value.isfinite().all() for value in found.values())


def test_a_mask_without_a_token_gives_zero(implementation):
    case = make_case(mask=True)
    assert case.mask is not None
    found = results(replace(case, mask=torch.zeros_like(case.mask)), through="ops")
    assert found["loss"] == 0
    assert found["sparsity_dx"].abs().max() == 0


def test_zero_outputs_have_the_cosine_of_pytorch(implementation):
    """A zero token and a zero expert: torch's eps decides, in value and gradient."""
    case = make_case(batch=2, tokens=3, ranks=(2, 3))
    case.x[0, 1] = 0
    case.up[:, :2], case.down[:2] = 0, 0
    expected, found = results(case, through="reference"), results(case, through="ops")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert expected["dx"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(implementation, dtype):
    case = make_case(batch=8, tokens=40, d_ff=192, d_model=96, ranks=(32,) * 6, dtype=dtype)
    first, second = results(case, through="ops"), results(case, through="ops")
    for name, value in first.items():
        assert torch.equal(second[name], value), name
