"""Which implementation runs inside the ops: PEMT_OPS, or the best one the device has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import packed, reference
from .checks import OpsError, compute_dtype


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The bodies of the four ops, with the signatures of `packed`."""

    name: str
    expert_mixture: Callable[..., tuple[Tensor, Tensor]]
    expert_mixture_backward: Callable[..., tuple[Tensor, Tensor]]
    task_sparsity: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    task_sparsity_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _reference_sparsity(
    z: Tensor, latent: Tensor, up: Tensor, gram: Tensor, gates: Tensor, scales: Any, ranks: Any,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The reference's loss, with packed's tensors for the backward pass."""
    _, *saved = packed.task_sparsity(z, latent, up, gram, gates, scales, ranks, token_weights)
    loss = reference.task_sparsity(z, latent, up, gates, scales, ranks, token_weights)
    if z.shape[0] * z.shape[1] == 0:
        loss = torch.zeros((), dtype=compute_dtype(z.dtype), device=z.device)
    return loss, saved[0], saved[1], saved[2]


PACKED = Kernels(
    name="packed",
    expert_mixture=packed.expert_mixture,
    expert_mixture_backward=packed.expert_mixture_backward,
    task_sparsity=packed.task_sparsity,
    task_sparsity_backward=packed.task_sparsity_backward,
)
REFERENCE = Kernels(
    name="reference",
    expert_mixture=reference.expert_mixture,
    expert_mixture_backward=packed.expert_mixture_backward,
    task_sparsity=_reference_sparsity,
    task_sparsity_backward=packed.task_sparsity_backward,
)
_BY_NAME = {"reference": REFERENCE, "packed": PACKED}


def kernels_for(tensor: Tensor) -> Kernels:
    """The implementation for this tensor's device.

    Raises OpsError where PEMT_OPS names one that does not exist.
    """
    forced = os.environ.get("PEMT_OPS", "")
    if not forced:
        return PACKED
    if forced not in _BY_NAME:
        raise OpsError(f"PEMT_OPS: found {forced!r}; use one of {', '.join(_BY_NAME)}, or unset it")
    return _BY_NAME[forced]
