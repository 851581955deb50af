"""The mean over the prompt: its gradient is added into x's where that belongs to nobody else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pemt import ops
from tests.ops.op_cases import make_case

PROMPT_LENGTH = 2


def plain(x: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x, x[:, :prompt_length].to(dtype).mean(dim=1)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_a_slice(implementation, dtype):
    x, dy = draw(2, 5, 3, dtype=dtype).requires_grad_(), draw(2, 5, 3, dtype=dtype)

    def gradient(mean: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        y, mean_BX = mean(x, PROMPT_LENGTH)
        dmean = draw(2, 3, dtype=mean_BX.dtype)
        return y, mean_BX, *torch.autograd.grad([y * 1, mean_BX], x, [dy, dmean])

    found, expected = gradient(ops.prompt_mean), gradient(plain)
    assert all(map(torch.equal, found, expected))


def test_either_output_alone_has_its_gradient(implementation):
    x = draw(2, 5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.prompt_mean(x, PROMPT_LENGTH), (x,))
    assert torch.autograd.gradcheck(lambda x: ops.prompt_mean(x, PROMPT_LENGTH)[0], (x,))
    assert torch.autograd.gradcheck(lambda x: ops.prompt_mean(x, PROMPT_LENGTH)[1], (x,))


def test_a_gradient_that_others_hold_is_not_written_to(implementation):
    x = draw(2, 5, 3, dtype=torch.float64).requires_grad_()
    held = draw(2, 5, 3, dtype=torch.float64)
    before = held.clone()
    y, mean_BX = ops.prompt_mean(x, PROMPT_LENGTH)
    (found,) = torch.autograd.grad([y, mean_BX], x, [held, torch.ones_like(mean_BX)])
    assert torch.equal(held, before)
    expected = before.clone()
    expected[:, :PROMPT_LENGTH] += 1 / PROMPT_LENGTH
    assert torch.equal(found, expected)
    # one number, expanded: there is no place to add in
    y, mean_BX = ops.prompt_mean(x, PROMPT_LENGTH)
    (found,) = torch.autograd.grad(y.sum() + mean_BX.sum(), x)
    assert torch.equal(found, expected - before + 1)


@pytest.mark.parametrize("implementation", ["cpu", "cuda on the host"], indirect=True)
def test_no_tensor_of_xs_size_is_made_for_it(implementation):
    case = make_case(tokens=40, dtype=torch.float32)
    x = case.x.requires_grad_()

    def operators(mean: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> set[str]:
        same, mean_BF = mean(x, PROMPT_LENGTH)
        y, _ = case.output(same, sparsity=False)
        loss = y.square().sum() + mean_BF.sum()
        # Not a dispatch mode: it would hold the gradient, which is then not written to.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(loss, x)
        return {event.name for event in profile.events()}

    assert "aten::slice_backward" in operators(plain)
    assert not operators(ops.prompt_mean) & {"aten::slice_backward", "aten::clone"}
