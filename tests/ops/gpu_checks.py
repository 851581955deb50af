"""What is asked of the compiled kernels on a GPU; with torch and pemt.ops alone: nothing else need be installed.

`standalone.py` runs them without pytest, `test_gpu.py` with it. Each takes a device: "cpu" where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from pemt import ops
from pemt.ops.select import kernels_for
from tests.ops.op_cases import allowed_error, make_case, relative_error, results

SHAPES = {
    "wide": {"batch": 4, "tokens": 40, "d_ff": 256, "d_model": 128, "ranks": (64, 64, 32), "mask": True},
    "one token": {"batch": 4, "tokens": 1, "d_ff": 256, "d_model": 128, "ranks": (64, 64, 32)},
    "odd sizes": {"batch": 3, "tokens": 67, "d_ff": 37, "d_model": 129, "ranks": (31, 65, 9)},
    "many ranks": {"batch": 2, "tokens": 33, "d_ff": 512, "d_model": 512, "ranks": (200, 8, 130, 64)},
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values(shape: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients are at most twice as far from the truth as PyTorch's, and the same bits twice."""
    case = make_case(**SHAPES[shape], inner=32, dtype=dtype).on(device)
    truth = results(case.to(torch.float64), through="reference")
    composed, found = results(case, through="reference"), results(case, through="ops")
    again = results(case, through="ops")
    for name, exact in truth.items():
        error = relative_error(found[name], exact)
        most = 1e-12 if dtype == torch.float64 else allowed_error(name, composed, truth)
        assert error <= most, f"{name}: is off by {error:.3g}, allowed is {most:.3g}"
        assert torch.equal(found[name], again[name]), f"{name}: another run gives other bits"


def an_empty_batch(device: str) -> None:
    """No sample or no token: zero, and not NaN."""
    for batch, tokens in ((0, 4), (3, 0)):
        case = make_case(batch=batch, tokens=tokens, dtype=torch.float32).on(device)
        found = results(case, through="ops")
        assert found["loss"] == 0
        assert all(value.isfinite().all() for value in found.values())


def gates_made_within(device: str) -> None:
    """Output and gradients are those with gates that autograd makes before the op."""
    case = make_case(batch=3, tokens=7, dtype=torch.float32).on(device)
    x, gate = case.x.requires_grad_(), torch.randn(24, 2, device=device, requires_grad=True)
    experts = (case.scales, case.ranks)
    z, loss, gates = ops.gated_output(
        x, case.stacked, case.up, gate, 4, *experts, adapter=case.adapter
    )
    before = ops.reference.gates(ops.prompt_mean(x, 4), gate)
    torch.testing.assert_close(gates, before)
    other_z, other_loss = replace(case, mask=None).output(gates=before)
    torch.testing.assert_close(
        torch.autograd.grad(z.square().sum() + loss, (x, gate)),
        torch.autograd.grad(other_z.square().sum() + other_loss, (x, gate)),
    )


def a_graph_captures_the_ops(device: str) -> None:
    """Forward and backward: one host synchronisation in any of them ends the capture."""
    case = make_case(batch=4, tokens=40, dtype=torch.float32).on(device)
    kernels, grad = kernels_for(case.x), torch.ones((), device=device)
    x, *frozen, gates, down, down_bias, up, up_bias, scales, ranks, weights, _ = case.arguments

    def step() -> list[torch.Tensor]:
        adapter, experts = (down, down_bias, up, up_bias), (scales, ranks, weights)
        z, loss, *saved = kernels.ffn_output(x, *frozen, gates, *adapter, *experts, True)
        given = (z, grad, z, *saved, *frozen, gates, down, up, *experts, True)
        return [z, loss, *kernels.ffn_output_backward(*given)]

    first = step()
    if device == "cpu":  # has no graphs
        assert all(map(torch.equal, first, step()))
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    case.x.mul_(2)
    graph.replay()
    assert all(map(torch.equal, captured, step()))


Check = Callable[[str], None]
BRIEF: dict[
    str, Check
] = {  # what a sanitizer, under which a kernel takes a hundred times as long, still ends soon
    f"values: {shape}, {dtype}": partial(values, shape, dtype)
    for shape in ("one token", "odd sizes")
    for dtype in (torch.float32, torch.bfloat16)
}
CHECKS: dict[str, Check] = {
    **{f"values: {shape}, {dtype}": partial(values, shape, dtype) for shape in SHAPES for dtype in DTYPES},
    "an empty batch": an_empty_batch,
    "gates made within": gates_made_within,
    "a graph captures the ops": a_graph_captures_the_ops,
}  # fmt: skip
