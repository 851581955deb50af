"""Inputs, and one layer's loss through the reference or the ops, for every test in this folder.

B batch, S tokens, F d_ff, D d_model, K experts, T the sum of the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pemt import ops
from pemt.ops import reference


@dataclass(frozen=True, kw_only=True)
class Case:
    x: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    gates: Tensor
    scales: list[float]
    ranks: list[int]
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype; gates stay in float32 unless that is float64."""
        tensors = {name: getattr(self, name).to(dtype) for name in ("x", "weight", "down", "up")}
        gates = self.gates.to(torch.promote_types(dtype, torch.float32))
        return replace(self, **tensors, gates=gates)

    def on(self, device: str) -> Case:
        """The same numbers on another device."""
        names = ("x", "weight", "down", "up", "gates", "mask")
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in present.items()})

    @property
    def mixture(self) -> tuple:
        return self.x, self.weight, self.down, self.up, self.gates, self.scales, self.ranks


def make_case(
    *, batch: int = 2, tokens: int = 5, d_ff: int = 24, d_model: int = 16,
    ranks: tuple[int, ...] = (4, 4), mask: bool = False, dtype: torch.dtype = torch.float64,
    seed: int = 0,
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
    case = Case(
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
    """Outputs and gradients of mixture and sparsity; every path into x and gates carries weight."""
    experts = (case.scales, case.ranks)
    frozen = (case.weight, case.down, case.up)
    x, gates = case.x.detach().requires_grad_(), case.gates.detach().requires_grad_()
    mixture = reference.expert_mixture if through == "reference" else ops.expert_mixture
    y, latent = mixture(x, *frozen, gates, *experts)
    weight_y = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y)
    weight_l = torch.sin(torch.arange(latent.numel(), dtype=torch.float64)).view_as(latent)
    objective = (y * weight_y).sum() + (latent * weight_l.to(latent)).sum()
    dx, dgates = torch.autograd.grad(objective, (x, gates))

    z = (y + torch.tanh(y)).detach().requires_grad_()
    latent = latent.detach().requires_grad_()
    weights = None
    if case.mask is not None:
        weights = case.mask.to(gates.dtype) / case.mask.sum().clamp(min=1)
    if through == "reference":
        loss = reference.task_sparsity(z, latent, case.up, gates, *experts, weights)
        cosines = reference.expert_cosines(z, latent, case.up, *experts)
    else:
        loss = ops.task_sparsity(z, latent, case.up, gates, *experts, case.mask)
        _, _, stats, _ = torch.ops.pemt.task_sparsity(z, latent, case.up, gates, *experts, weights)
        cosines = stats[..., : len(case.ranks)]
    dz, dlatent, sparsity_dgates = torch.autograd.grad(loss, (z, latent, gates))
    return {
        "y": y.detach(), "latent": latent.detach(), "dx": dx, "dgates": dgates,
        "cosines": cosines.detach(), "loss": loss.detach(),
        "dz": dz, "dlatent": dlatent, "sparsity_dgates": sparsity_dgates,
    }  # fmt: skip


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def allowed_error(name: str, composed: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Twice that of PyTorch's own operators."""
    # A mean over tokens can come out exact by luck: hold it to the error of what it averages.
    source = "cosines" if name in ("loss", "sparsity_dgates") else name
    allowed = 2 * relative_error(composed[source], truth[source])
    if "dgates" in name:  # sums of few numbers of both signs can be exact by luck too
        allowed = max(allowed, 8 * torch.finfo(composed[name].dtype).eps)
    return allowed
