"""`pemt bench op`: one FFN's mixture, target adapter and sparsity loss, forward and backward.

N tokens, F d_ff, D d_model, K experts, R rank, T = K R, H the target adapter's inner width.

    loop     the reference: a loop over experts, again for the cosines, autograd's own backward
    stacked  the same with the K outputs made once and kept
    packed   concatenated matrix products and the Gram identity in plain PyTorch
    fused    the compiled kernels
    floor    bare matrix products of the FLOPs that packed and fused do, outputs preallocated
    frozen   no experts: wo and the target adapter alone

All variants run in every round, in turn, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from json import dumps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, linear

from pemt import ops
from pemt.command_line import Parser, command_parser
from pemt.ops import reference
from pemt.plan.shapes import KNOWN

RATIOS = (("fused", "floor"), ("loop", "fused"), ("stacked", "fused"), ("packed", "fused"),
          ("loop", "floor"), ("fused", "frozen"))  # fmt: skip
VARIANTS = ("loop", "stacked", "packed", "fused", "floor", "frozen")
EXPERTS, RANK, ADAPTER_REDUCTION, SPARSITY_WEIGHT = 6, 64, 16, 0.1


@dataclass(frozen=True, kw_only=True)
class OpBench:
    """What to measure.

    Args:
        shape: a name in `pemt.plan.shapes.KNOWN`.
        batch: samples; tokens: tokens per sample.
        device: cpu or cuda; dtype: a name in torch.
        rounds: how often every variant is timed.
        forward_only: no gradients and no sparsity loss, as in decoding.
    """

    shape: str
    batch: int = 4
    tokens: int = 256
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 20
    forward_only: bool = False


class Layer:
    """One FFN's output side: frozen projection and experts, trainable gates and target adapter."""

    def __init__(self, bench: OpBench) -> None:
        self.bench = bench
        d_model, d_ff = KNOWN[bench.shape].d_model, KNOWN[bench.shape].d_ff
        inner, total = d_model // ADAPTER_REDUCTION, EXPERTS * RANK
        torch.manual_seed(0)

        def draw(*shape: int, fan_in: int = 1) -> Tensor:
            value = torch.randn(shape, device=bench.device) / fan_in**0.5
            return value.to(getattr(torch, bench.dtype))

        self.weight = draw(d_model, d_ff, fan_in=d_ff)
        self.down = draw(total, d_ff, fan_in=d_ff)
        self.up = draw(d_model, total, fan_in=RANK)
        self.ranks, self.scales = [RANK] * EXPERTS, [1.0] * EXPERTS
        self.gram = ops.gram_matrix(self.up, self.ranks)
        self.x = draw(bench.batch, bench.tokens, d_ff)
        self.gates = draw(bench.batch, EXPERTS).float().softmax(dim=-1)
        self.adapter = [draw(inner, d_model, fan_in=d_model), draw(inner),
                        draw(d_model, inner, fan_in=inner), draw(d_model)]  # fmt: skip
        self.dz = draw(bench.batch, bench.tokens, d_model)
        if not bench.forward_only:
            for tensor in self.trainable:
                tensor.requires_grad_()

    def adapt(self, y: Tensor) -> Tensor:
        """The target adapter: y [B,S,D] + up(gelu_new(down(y)))."""
        down, down_bias, up, up_bias = self.adapter
        return y + linear(gelu(linear(y, down, down_bias), approximate="tanh"), up, up_bias)

    @property
    def trainable(self) -> list[Tensor]:
        """What gets a gradient: input, gates, the adapter's four tensors."""
        return [self.x, self.gates, *self.adapter]

    def backward(self, z: Tensor, sparsity: Tensor | None) -> None:
        """Gradients of <z, dz> + 0.1 * sparsity."""
        if self.bench.forward_only:
            return
        if sparsity is None:
            z.backward(self.dz)
        else:
            weight = torch.full_like(sparsity, SPARSITY_WEIGHT)
            torch.autograd.backward([z, sparsity], [self.dz, weight])


def forward_loop(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """One FFN and its loss with a loop over the experts."""
    y, latent = reference.expert_mixture(
        layer.x, layer.weight, layer.down, layer.up, layer.gates, layer.scales, layer.ranks
    )
    z = layer.adapt(y)
    if layer.bench.forward_only:
        return z, None
    return z, reference.task_sparsity(
        z, latent, layer.up, layer.gates, layer.scales, layer.ranks, None
    )


def forward_stacked(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """One FFN and its loss with all experts' outputs kept side by side, as published."""
    outputs = []
    for k in range(EXPERTS):
        ranks = slice(k * RANK, (k + 1) * RANK)
        latent = linear(layer.x, layer.down[ranks])
        outputs.append(layer.scales[k] * linear(latent, layer.up[:, ranks]))
    o = torch.stack(outputs, dim=2)
    y = linear(layer.x, layer.weight) + (layer.gates[:, None, :, None].to(o.dtype) * o).sum(dim=2)
    z = layer.adapt(y)
    if layer.bench.forward_only:
        return z, None
    cosines = cosine_similarity(z[:, :, None].float(), o.float(), dim=-1)
    return z, (layer.gates.mean(0) * (1 - cosines).mean(dim=(0, 1))).sum()


def forward_ops(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """One FFN and its loss with the fused op."""
    y, latent = ops.expert_mixture(
        layer.x, layer.weight, layer.down, layer.up, layer.gates, layer.scales, layer.ranks
    )
    z = layer.adapt(y)
    if layer.bench.forward_only:
        return z, None
    return z, ops.task_sparsity(
        z, latent, layer.up, layer.gram, layer.gates, layer.scales, layer.ranks
    )


def forward_frozen(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """One FFN without experts."""
    return layer.adapt(linear(layer.x, layer.weight)), None


def step(layer: Layer, forward: Callable[[Layer], tuple[Tensor, Tensor | None]]) -> None:
    """A forward pass, the loss, and its backward pass."""
    layer.backward(*forward(layer))
    for tensor in layer.trainable:
        tensor.grad = None


def step_ops(layer: Layer, implementation: str) -> None:
    """The same with the fused op."""
    with forced(implementation):
        step(layer, forward_ops)


class Floor:
    """The matrix products that no way round the identities saves, and nothing else."""

    def __init__(self, layer: Layer) -> None:
        weight, down, up = layer.weight, layer.down, layer.up
        adapter_down, _, adapter_up, _ = (tensor.detach() for tensor in layer.adapter)
        x = layer.x.detach().flatten(0, 1)
        wide = layer.dz.flatten(0, 1)
        latent, hidden = wide @ up, wide @ adapter_down.T
        forward = [(x, weight.T), (x, down.T), (latent, up.T),
                   (wide, adapter_down.T), (hidden, adapter_up.T)]  # fmt: skip
        backward = [
            (wide, up), (latent, up.T),  # sparsity: z up, and its gradient back to z
            (wide, adapter_up), (wide.T, hidden), (hidden, adapter_down), (hidden.T, wide),
            (wide, up), (wide, weight), (latent, down),
        ]  # fmt: skip
        self.products = forward if layer.bench.forward_only else forward + backward
        self.outputs = [left @ right for left, right in self.products]

    def __call__(self) -> None:
        for (left, right), output in zip(self.products, self.outputs, strict=True):
            torch.mm(left, right, out=output)

    @property
    def flops(self) -> int:
        """Of all products, each multiply-add counted as two."""
        return sum(2 * left.shape[0] * right.numel() for left, right in self.products)


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """PEMT_OPS for a while."""
    before = os.environ.get("PEMT_OPS")
    os.environ["PEMT_OPS"] = implementation
    try:
        yield
    finally:
        os.environ.pop("PEMT_OPS")
        if before is not None:
            os.environ["PEMT_OPS"] = before


def time_once(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(bench: OpBench) -> dict[str, object]:
    """Times all variants in turn, `rounds` times: milliseconds, ratios and the floor's rate."""
    layer = Layer(bench)
    floor = Floor(layer)
    runs: dict[str, Callable[[], None]] = {
        "loop": partial(step, layer, forward_loop),
        "stacked": partial(step, layer, forward_stacked),
        "packed": partial(step_ops, layer, "packed"),
        "fused": partial(step_ops, layer, bench.device),
        "floor": floor,
        "frozen": partial(step, layer, forward_frozen),
    }
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with torch.set_grad_enabled(not bench.forward_only):
        for run in runs.values():  # warm-up; the first one builds the kernels
            run()
            run()
        for number in range(bench.rounds):
            turn = number % len(VARIANTS)  # no variant always follows the same other
            for name in VARIANTS[turn:] + VARIANTS[:turn]:
                times[name].append(time_once(runs[name], bench.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{over}/{under}": statistics.median(
            a / b for a, b in zip(times[over], times[under], strict=True)
        )
        for over, under in RATIOS
    }
    return {
        **asdict(bench),
        "threads": torch.get_num_threads(),
        "milliseconds": medians,
        "ratios": ratios,
        "floor_tflops": floor.flops / medians["floor"] / 1e9,
    }


def make_parser() -> Parser:
    """The command line of `pemt bench op`."""
    parser = command_parser(
        "bench op", __doc__, "pemt bench op --shape t5-base t5-large --rounds 20"
    )
    parser.add_argument("--shape", nargs="+", choices=list(KNOWN), default=["t5-large"])
    parser.add_argument("--batch", type=int, default=OpBench.batch)
    parser.add_argument("--tokens", type=int, default=OpBench.tokens, help="per sample")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=OpBench.device)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default=OpBench.dtype
    )
    parser.add_argument("--rounds", type=int, default=OpBench.rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--forward_only", action="store_true", help="no gradients, no sparsity loss"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per shape")
    return parser


def run(*, shape: Sequence[str], threads: int, json: bool, **options: Any) -> None:
    """Measure and print; the options are those of `make_parser`."""
    torch.set_num_threads(threads)
    for each in shape:
        result = measure(OpBench(shape=each, **options))
        print(dumps(result) if json else table(result))


def table(result: dict[str, object]) -> str:
    """The result as text."""
    milliseconds, ratios = result["milliseconds"], result["ratios"]
    assert isinstance(milliseconds, dict)
    assert isinstance(ratios, dict)
    head = (
        f"{result['shape']}: {result['batch']} x {result['tokens']} tokens, {result['dtype']} on"
        f" {result['device']} ({result['threads']} threads), medians of {result['rounds']} rounds"
    )
    rows = [f"  {name:<8} {value:10.3f} ms" for name, value in milliseconds.items()]
    rows += [f"  {name:<15} {value:8.3f}" for name, value in ratios.items()]
    return "\n".join([head, *rows, f"  floor at {result['floor_tflops']:.3f} TFLOP/s"])
