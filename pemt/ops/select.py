"""Which implementation runs inside the ops: PEMT_OPS, or the best one the device has."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import library, packed, reference
from .checks import OpsError


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The bodies of `schema`'s two ops, with the signatures of `packed`.

    Compiled ones have `gated_output` besides, and bring their own gradients (csrc/binding.cpp).
    Compiled for a CPU they have the product of `linear` too, and `products` chooses which library multiplies.
    """

    ffn_output: Callable[..., tuple[Tensor, ...]]
    ffn_output_backward: Callable[..., tuple[Tensor, ...]]
    gated_output: Callable[..., tuple[Tensor, ...]] | None = None
    few_rows: Callable[[Tensor, Tensor], Tensor] | None = None
    choose_onednn: Callable[[list[int], bool], None] | None = None

    @classmethod
    def of(cls, namespace: Any) -> Kernels:
        """The functions of these names in a module, or in a compiled library's torch.ops namespace."""
        found: Any = {each.name: getattr(namespace, each.name, None) for each in fields(cls)}
        return cls(**found)


def _reference_output(
    x: Tensor, stacked: Tensor, up: Tensor, gates: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The reference's z and loss, with packed's tensors for the backward pass."""
    *adapter, scales, ranks, token_weights, sparsity = rest
    _, loss, *saved = packed.ffn_output(x, stacked, up, gates, *rest)
    weight, down = stacked.split([len(up), up.shape[1]])
    y, latent = reference.expert_mixture(x, weight, down, up, gates, scales, ranks)
    z = reference.adapted(y, [] if adapter[0] is None else adapter)
    if sparsity and z.numel() > 0:
        loss = reference.task_sparsity(z, latent, up, gates, scales, ranks, token_weights)
    return z, loss, *saved


PACKED = Kernels.of(packed)
REFERENCE = Kernels(ffn_output=_reference_output, ffn_output_backward=packed.ffn_output_backward)
ANY_DEVICE = {"reference": REFERENCE, "packed": PACKED}


@functools.cache
def compiled(device: str) -> Kernels:
    """The compiled kernels of a device type, built at first use.

    Raises OpsError where they cannot be had.
    """
    found = library.LIBRARIES[device]()
    if device == "cuda":
        library.check_capability()
    library.load(found)
    return Kernels.of(getattr(torch.ops, found.namespace))


@functools.cache
def _best(device: str) -> Kernels:
    if device not in library.LIBRARIES:
        return PACKED
    try:
        return compiled(device)
    except OpsError as error:
        warnings.warn(f"{error}; plain PyTorch runs instead", RuntimeWarning, stacklevel=2)
        return PACKED


def prepare(device: str) -> None:
    """Build and load now what runs on a device type, rather than in the first step.

    Raises:
        OpsError: as `kernels_for`.
    """
    kernels_for(torch.empty(0, device=device))


def kernels_for(tensor: Tensor) -> Kernels:
    """The implementation for this tensor's device.

    Raises:
        OpsError: PEMT_OPS names an implementation that does not exist, serves another device or
            cannot be built.
    """
    device, forced = tensor.device.type, os.environ.get("PEMT_OPS", "")
    if not forced:
        return _best(device)
    if forced in ANY_DEVICE:
        return ANY_DEVICE[forced]
    if forced not in library.LIBRARIES:
        choices = ", ".join([*ANY_DEVICE, *library.LIBRARIES])
        raise OpsError(f"PEMT_OPS: found {forced!r}; use one of {choices}, or unset it")
    if forced != device:
        raise OpsError(f"PEMT_OPS: {forced!r} cannot run tensors on {device}; unset it")
    return compiled(forced)
