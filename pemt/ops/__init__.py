"""The mixture of frozen experts and its sparsity loss: two differentiable ops.

B batch, S tokens (prompt included), F d_ff, D d_model, K experts, T the sum of the K ranks.

    down, up, scales, ranks = orthonormal_experts(down, up, scales, ranks)  # once: they are frozen
    y, latent = expert_mixture(x, weight, down, up, gates, scales, ranks)
    z = y + adapter(y)
    loss = task_sparsity(z, latent, up, gates, scales, ranks, mask)

Gradients reach x, gates, latent and z. The K outputs of width D are never made, and of x only the
latent of width T is kept for the backward pass. The package knows PyTorch alone.

Four implementations, chosen by `select`; PEMT_OPS=<name> forces one, and then a failure is an error:
    reference  a loop over the experts in the forward pass: the specification
    packed     plain PyTorch in few matrix products, for every device without a compiled kernel
    cpu        C++: csrc/ops.cpp over csrc/cpu_kernels.cpp
    cuda       the same ops.cpp over csrc/cuda_*.cu. Not run on a GPU yet: its sources have
               been compiled for sm_80 and sm_90a, and run on the host by the tests' emulation

`library` compiles the last two at first use, once for all ranks; `build` is `pemt ops build|info`.
`schema` registers the `torch.library` ops with their fake implementations and autograd; in eager mode
compiled kernels are called past it, with their gradients in C++ (csrc/binding.cpp). `orthonormal` splits
experts into the factors that the loss wants. `linear` is a linear layer's product where no gradient is
wanted, with csrc/cpu_few_rows.cpp; `products` measures which library multiplies on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import schema  # registers the ops
from .checks import (
    OpsError,
    check_mixture,
    check_prompt,
    check_sparsity,
    compute_dtype,
)
from .orthonormal import orthonormal_experts
from .products import choose_libraries
from .select import Kernels, kernels_for

__all__ = ["OpsError", "expert_mixture", "orthonormal_experts", "prompt_mean", "task_sparsity"]


def expert_mixture(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, gates: Tensor,
    scales: Sequence[float], ranks: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The frozen output projection plus the gated mixture of K LoRA experts (arXiv 2402.15082).

    Args:
        x: [B, S, F], the input of the FFN's output projection.
        weight: [D, F], that projection, frozen.
        down: [T, F] and up: [D, T], the experts' factors, frozen; expert k owns ranks[k] rows and
            columns.
        gates: [B, K], one vector per sample; computed with in float32 whatever its dtype.
        scales: K factors (alpha / rank).
        ranks: K ranks with sum T; they may differ.

    Returns:
        y [B, S, D] = x weight^T + sum_k gates[:, k] scales[k] (x down_k^T) up_k^T and
        latent [B, S, T] = x down^T, both in x's dtype (under autocast: in autocast's).

    Raises:
        OpsError: a shape, dtype or device is wrong, or weight, down or up requires grad.
    """
    x, weight, down, up = _autocast(x, weight, down, up)
    check_mixture(x, weight, down, up, gates, scales, ranks)
    arguments = (x, weight, down, up, gates, scales, ranks)
    y, latent = _call("expert_mixture", *arguments)
    return y, latent


def task_sparsity(
    z: Tensor, latent: Tensor, up: Tensor, gates: Tensor,
    scales: Sequence[float], ranks: Sequence[int], mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The task sparsity loss of one FFN (arXiv 2402.15082).

    sum_k mean_b(gates[b, k]) * mean over tokens (1 - cos(z, o_k)) with
    o_k = scales[k] latent_k up_k^T, which is never made.

    Args:
        z: [B, S, D], the FFN's output after the target adapter.
        latent: [B, S, T] from `expert_mixture`.
        up: [D, T], frozen, every expert's an isometry, as `orthonormal_experts` makes them:
            the norms of the outputs are taken from the latent.
        gates, scales, ranks: as in `expert_mixture`.
        mask: [B, S], nonzero where a token counts; without it all do.

    Returns:
        A scalar in float32 (float64 for float64); 0 where no token counts. Cosines have the
        eps of torch.nn.functional.cosine_similarity.

    Raises:
        OpsError: a shape, dtype or device is wrong, or up requires grad.
    """
    z, latent, up = _autocast(z, latent, up)
    check_sparsity(z, latent, up, gates, scales, ranks, mask)
    token_weights = None
    if mask is not None:
        counted = (mask != 0).to(compute_dtype(z.dtype))
        token_weights = counted / counted.sum().clamp(min=1)
    arguments = (z, latent, up, gates, scales, ranks, token_weights)
    loss, *_ = _call("task_sparsity", *arguments)
    return loss


def prompt_mean(x: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
    """What a gate reads, the mean over the prompt (arXiv 2402.15082).

    Args:
        x: [B, S, X], the prompt first.
        prompt_length: P, its tokens.

    Returns:
        x [B, S, X], to be used in the argument's place and not to be written to: so compiled kernels add the
        mean's gradient into x's, and make no tensor of x's size for it; and the mean [B, X] in float32
        (float64 for float64).

    Raises:
        OpsError: x has not 3 dimensions, or not P tokens.
    """
    check_prompt(x, prompt_length)
    kernels = _direct(x)
    if kernels is None or kernels.prompt_mean is None:
        return x, x[:, :prompt_length].to(compute_dtype(x.dtype)).mean(dim=1)
    return kernels.prompt_mean(x, prompt_length)


def _call(name: str, first: Tensor, *rest: Any) -> Any:
    kernels = _direct(first)
    if kernels is None:
        return getattr(torch.ops.pemt, name)(first, *rest)
    choose_libraries(kernels, first, *schema.PRODUCTS[name](first, *rest))
    return getattr(kernels, name)(first, *rest)


def _direct(tensor: Tensor) -> Kernels | None:
    """Compiled kernels, if they may be called past `schema`, whose Python costs the host more than they do.

    Not where something looks at every operator, or puts another in its place: it would see those inside a kernel, and
    not what the kernel does by itself.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    if tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    kernels = kernels_for(tensor)
    return kernels if kernels.differentiable else None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would hand them to a matrix product."""
    kind = tensors[0].device.type
    # Meta tensors know no autocast. `torch.amp.is_autocast_available` would tell, and breaks a graph of torch 2.11.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )
