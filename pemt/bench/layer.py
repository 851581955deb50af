"""One FFN's output side, in every way that `pemt bench op` measures.

B batch, S tokens, F d_ff, D d_model, K experts, R rank of each.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, gelu, linear

from pemt import ops
from pemt.ops import products, reference
from pemt.ops.linear import mixture_step
from pemt.ops.packed import rank_factors
from pemt.plan import KNOWN

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
        cuda_graph: replay each variant as a CUDA graph, so that no host's time is in it.
    """

    shape: str
    batch: int = 4
    tokens: int = 256
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 20
    forward_only: bool = False
    cuda_graph: bool = False


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
        self.down, self.up, self.scales, self.ranks = ops.orthonormal_experts(
            self.down, self.up, [1.0] * EXPERTS, [RANK] * EXPERTS
        )
        self.stacked = torch.cat([self.weight, self.down])
        self.x = draw(bench.batch, bench.tokens, d_ff)
        self.gates = draw(bench.batch, EXPERTS).float().softmax(dim=-1)
        self.factors = rank_factors(self.gates, self.scales, self.ranks)[:, None].to(self.x.dtype)
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
    experts = (layer.gates, layer.scales, layer.ranks)
    y, latent = reference.expert_mixture(layer.x, layer.weight, layer.down, layer.up, *experts)
    z = layer.adapt(y)
    if layer.bench.forward_only:
        return z, None
    return z, reference.task_sparsity(z, latent, layer.up, *experts)


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
    """One FFN and its loss with the fused op; without gradients, what `generate` calls for a token."""
    if layer.bench.forward_only:
        frozen = (layer.weight, layer.down, layer.up)
        return layer.adapt(mixture_step(layer.x, *frozen, layer.factors)), None
    return ops.ffn_output(
        layer.x, layer.stacked, layer.up, layer.gates, layer.scales, layer.ranks,
        adapter=layer.adapter,
    )  # fmt: skip


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
    """The matrix products that no way round the identities saves, and nothing else.

    Those with frozen weights are by the library that the fused op has them by; `libraries` counts them. `flops` are
    of all products, each multiply-add counted as two.
    """

    def __init__(self, layer: Layer) -> None:
        up = layer.up
        adapter_down, _, adapter_up, _ = (tensor.detach() for tensor in layer.adapter)
        x = layer.x.detach().flatten(0, 1)
        wide = layer.dz.flatten(0, 1)
        latent, hidden = wide @ up, wide @ adapter_down.T
        frozen = [(x, layer.stacked.T)]
        others = [(latent, up.T), (wide, adapter_down.T), (hidden, adapter_up.T)]
        if not layer.bench.forward_only:
            both = torch.cat([wide, latent], dim=1)  # the gradients of y and of the latent
            frozen += [(wide, up), (wide, up), (both, layer.stacked)]  # of z for the loss, of dy
            others += [
                (latent, up.T), (wide, adapter_up), (wide.T, hidden),
                (hidden, adapter_down), (hidden.T, wide),
            ]  # fmt: skip
        self.flops = sum(2 * len(left) * right.numel() for left, right in frozen + others)
        self.libraries: Counter[str] = Counter()
        self.runs = [self._run(left, right) for left, right in frozen]
        self.runs += [self._blas(left, right) for left, right in others]

    def _run(self, left: Tensor, right: Tensor) -> Callable[[], object]:
        if left.device.type == "cpu" and left.dtype == torch.float32:
            transposed = not right.is_contiguous()
            if products.choose(len(left), *right.shape, transposed=transposed) == products.ONEDNN:
                self.libraries[products.ONEDNN] += 1
                return partial(products.onednn, left, right.T)
        return self._blas(left, right)

    def _blas(self, left: Tensor, right: Tensor) -> Callable[[], object]:
        self.libraries[products.BLAS] += 1
        return partial(torch.mm, left, right, out=left @ right)

    @torch.no_grad()
    def __call__(self) -> None:
        for run in self.runs:
            run()


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
