"""Inputs, and one layer's loss through the reference or the ops, for every test in this folder.

B batch, S tokens, F d_ff, D d_model, K experts, T the sum of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pemt import ops
from pemt.ops import reference

AVERAGED = {  # whose errors each is held to
    "loss": ["cosines"],
    "sparsity_dgates": ["cosines"],
    "ddown_bias": ["ddown_bias", "ddown"],
    "sparsity_ddown_bias": ["sparsity_ddown_bias", "sparsity_ddown", "sparsity_dx"],
}


@dataclass(frozen=True, kw_only=True)
class Case:
    x: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    gates: Tensor
    scales: list[float]
    ranks: list[int]
    adapter: tuple[Tensor, ...] = ()
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype; gates stay in float32 unless that is float64."""
        tensors = {name: getattr(self, name).to(dtype) for name in ("x", "weight", "down", "up")}
        gates = self.gates.to(torch.promote_types(dtype, torch.float32))
        adapter = tuple(each.to(dtype) for each in self.adapter)
        return replace(self, **tensors, gates=gates, adapter=adapter)

    def on(self, device: str) -> Case:
        """The same numbers on another device."""
        names = ("x", "weight", "down", "up", "gates", "mask")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        adapter = tuple(each.to(device) for each in self.adapter)
        return replace(
            self, **{name: tensor.to(device) for name, tensor in present.items()}, adapter=adapter
        )

    @cached_property
    def stacked(self) -> Tensor:
        """[D+T, F], as the op takes the frozen weights."""
        return torch.cat([self.weight, self.down])

    def output(
        self, x: Tensor | None = None, gates: Tensor | None = None, *, sparsity: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """z and the loss, through the op."""
        return ops.ffn_output(
            self.x if x is None else x, self.stacked, self.up,
            self.gates if gates is None else gates, self.scales, self.ranks,
            adapter=self.adapter, sparsity=sparsity, token_weights=ops.token_weights(self.mask),
        )  # fmt: skip

    @property
    def arguments(self) -> tuple:
        """Of torch.ops.pemt.ffn_output."""
        adapter = self.adapter or (None,) * 4
        weights = ops.token_weights(self.mask)
        return (
            self.x,
            self.stacked,
            self.up,
            self.gates,
            *adapter,
            self.scales,
            self.ranks,
            weights,
            True,
        )


def make_case(
    *, batch: int = 2, tokens: int = 5, d_ff: int = 24, d_model: int = 16,
    ranks: tuple[int, ...] = (4, 4), inner: int = 5, mask: bool = False,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / fan_in**0.5

    total = sum(ranks)
    x, weight = draw(batch, tokens, d_ff), draw(d_model, d_ff, fan_in=d_ff)
    down, up = draw(total, d_ff, fan_in=d_ff), draw(d_model, total, fan_in=max(ranks))
    gates = draw(batch, len(ranks)).softmax(dim=-1)
    scales = [1.0 - 0.25 * k for k in range(len(ranks))]  # a zero and negative ones among them
    down, up, scales, owned = ops.orthonormal_experts(down, up, scales, ranks)
    adapter: tuple[Tensor, ...] = ()
    if inner:
        adapter = (draw(inner, d_model, fan_in=d_model), draw(inner),
                   draw(d_model, inner, fan_in=inner), draw(d_model))  # fmt: skip
    case = Case(
        adapter=adapter,
        x=x,
        weight=weight,
        down=down,
        up=up,
        gates=gates,
        scales=scales,
        ranks=owned,
        mask=torch.rand(batch, tokens, generator=generator) > 0.3 if mask else None,
    )
    # Rounded once to the dtype under test, so that float64 copies hold the very same numbers.
    return case.to(dtype)


def results(case: Case, *, through: str) -> dict[str, Tensor]:
    """Outputs and gradients of the whole; and the loss's own, where nothing else hides them."""
    x, gates = case.x.detach().requires_grad_(), case.gates.detach().requires_grad_()
    adapter = tuple(each.detach().requires_grad_() for each in case.adapter)
    given = replace(case, adapter=adapter)
    experts = (case.scales, case.ranks)
    if through == "reference":
        weights = ops.token_weights(case.mask)
        frozen = (case.weight, case.down, case.up)
        y, latent = reference.expert_mixture(x, *frozen, gates, *experts)
        z = reference.adapted(y, adapter)
        loss = reference.task_sparsity(z, latent, case.up, gates, *experts, weights)
        cosines = reference.expert_cosines(z, latent, case.up, *experts)
    else:
        z, loss = given.output(x, gates)
        *_, stats, _ = torch.ops.pemt.ffn_output(*case.arguments)
        cosines = stats[..., : len(case.ranks)]
    assert loss is not None
    weight_z = torch.cos(torch.arange(z.numel(), dtype=torch.float64)).view_as(z).to(z)
    inputs = (x, gates, *adapter)
    alone = torch.autograd.grad(loss, inputs, retain_graph=True)
    whole = torch.autograd.grad((z * weight_z).sum() + loss, inputs)
    names = ("dx", "dgates", "ddown", "ddown_bias", "dup", "dup_bias")[: len(inputs)]
    return {
        "z": z.detach(), "cosines": cosines.detach(), "loss": loss.detach(),
        **dict(zip(names, whole, strict=True)),
        **{f"sparsity_{name}": value for name, value in zip(names, alone, strict=True)},
    }  # fmt: skip


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def allowed_error(name: str, composed: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Twice that of PyTorch's own operators."""
    # A mean or a sum of few numbers can come out exact by luck: hold it to the error of what it is taken of.
    sources = AVERAGED.get(name, [name])
    allowed = 2 * max(relative_error(composed[each], truth[each]) for each in sources)
    if "dgates" in name:  # likewise, a few sums of numbers of both signs: in float32 too
        allowed = max(allowed, 8 * torch.finfo(composed[name].dtype).eps)
    return allowed
