"""Frozen experts on a frozen linear layer: one differentiable op.

B batch, S tokens (prompt included), F d_ff, D d_model, H the adapter's inner width, K experts,
T the sum of the K ranks.

    down, up, scales, ranks = orthonormal_experts(down, up, scales, ranks)  # once: they are frozen
    stacked = torch.cat([weight, down])                                     # likewise
    z, loss = ffn_output(x, stacked, up, gates, scales, ranks, adapter=adapter, token_weights=token_weights(mask))
    z, loss, gates = gated_output(x, stacked, up, gate, context, ...)      # the gates made within

Gradients reach x, the gates and the adapter. The K outputs of width D are never made, and of x only the
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

from . import reference, schema  # schema registers the ops
from .checks import OpsError, check_gate, check_gates, check_output, check_prompt, compute_dtype
from .orthonormal import orthonormal_experts
from .products import choose_libraries
from .select import Kernels, kernels_for

__all__ = [
    "OpsError",
    "ffn_output",
    "gated_output",
    "orthonormal_experts",
    "prompt_mean",
    "token_weights",
]


_NO_ADAPTER = (None,) * 4
_PREPARED: set[Any] = set()


def ffn_output(
    x: Tensor, stacked: Tensor, up: Tensor, gates: Tensor,
    scales: Sequence[float], ranks: Sequence[int], *, adapter: Sequence[Tensor] = (),
    sparsity: bool = True, token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Frozen output projection, gated mixture of K LoRA experts, target adapter, sparsity loss (arXiv 2402.15082).

    y = x weight^T + sum_k gates[:, k] o_k with o_k = scales[k] (x down_k^T) up_k^T, which is never made;
    z = y + adapter_up(gelu_new(adapter_down(y)));
    loss = sum_k mean_b(gates[b, k]) * mean over tokens (1 - cos(z, o_k)).

    Args:
        x: [B, S, F], the input of the FFN's output projection.
        stacked: [D + T, F], frozen: that projection's weight over the experts' down projections; expert k owns
            ranks[k] rows.
        up: [D, T], frozen, every expert's an isometry, as `orthonormal_experts` makes them: the
            norms of the outputs are taken from the latent.
        gates: [B, K], one vector per sample; computed with in float32 whatever its dtype.
        scales: K factors (alpha / rank).
        ranks: K ranks with sum T; they may differ.
        adapter: down [H, D], its bias [H], up [D, H], its bias [D]; or none, and z is y.
        sparsity: whether the loss is wanted.
        token_weights: [B, S] with sum 1, as `token_weights` makes them of a mask; without them all tokens count alike.

    Returns:
        z [B, S, D] in x's dtype (under autocast: in autocast's), and the loss, a scalar in float32 (float64 for
        float64), 0 where no token counts; None where it is not wanted. Cosines have the eps of
        torch.nn.functional.cosine_similarity.

    Raises:
        OpsError: a shape, dtype or device is wrong, or stacked or up requires grad.
    """
    x, stacked, up, *adapter = _autocast(x, stacked, up, *adapter)
    check_output(x, stacked, up, adapter, scales, ranks, token_weights)
    check_gates(x, gates, len(ranks))
    kernels = _direct(x)
    output: Any = torch.ops.pemt.ffn_output
    if kernels is not None:
        choose_libraries(kernels, x, *schema.products(stacked, up, adapted=bool(adapter)))
        output = kernels.ffn_output
    z, loss, *_ = output(
        x, stacked, up, gates, *(adapter or _NO_ADAPTER), scales, ranks, token_weights, sparsity
    )
    return z, loss if sparsity else None


def token_weights(mask: Tensor | None) -> Tensor | None:
    """[B, S] in float32: 1 / their number where the mask is not zero, for `ffn_output`; None for None."""
    if mask is None:
        return None
    counted = (mask != 0).float()
    return counted / counted.sum().clamp(min=1)


def gated_output(
    x: Tensor, stacked: Tensor, up: Tensor, gate: Tensor, context: Tensor | int,
    scales: Sequence[float], ranks: Sequence[int], *, adapter: Sequence[Tensor] = (),
    sparsity: bool = True, token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """`ffn_output` with the gates of a learned gate, softmax(context gate) (arXiv 2402.15082).

    Args:
        gate: [C, K]; gates are computed in float32 (float64 for float64) whatever its dtype.
        context: [B, C]; or a number of tokens P, for the mean of x over its first P, the prompt.

    Returns:
        z and the loss, as `ffn_output` does; the gates [B, K], to look at: no gradient comes through them.

    Raises:
        OpsError: as `ffn_output`.
    """
    x, stacked, up, *adapter = _autocast(x, stacked, up, *adapter)
    kernels = _direct(x)
    if kernels is not None and kernels.gated_output is not None:
        _prepare(kernels, x, stacked, up, gate, context, adapter, scales, ranks, token_weights)
        read = (context, 0) if isinstance(context, Tensor) else (None, context)
        z, loss, gates = kernels.gated_output(
            x, stacked, up, gate, *read, *(adapter or _NO_ADAPTER), scales, ranks, token_weights,
            sparsity,
        )  # fmt: skip
        return z, loss if sparsity else None, gates
    check_gate(x, gate, context, len(ranks))
    read_BC = context if isinstance(context, Tensor) else prompt_mean(x, context)
    gates = reference.gates(read_BC, gate)
    mixed = ffn_output(
        x, stacked, up, gates, scales, ranks,
        adapter=adapter, sparsity=sparsity, token_weights=token_weights,
    )  # fmt: skip
    return *mixed, gates.detach()


def prompt_mean(x: Tensor, prompt_length: int) -> Tensor:
    """The mean [B, X] of x [B, S, X] over its first tokens, in float32 (float64 for float64).

    Raises:
        OpsError: x has not 3 dimensions, or not so many tokens.
    """
    check_prompt(x, prompt_length)
    return x[:, :prompt_length].to(compute_dtype(x.dtype)).mean(dim=1)


def _prepare(
    kernels: Kernels, x: Tensor, stacked: Tensor, up: Tensor, gate: Tensor, context: Tensor | int,
    adapter: Sequence[Tensor], scales: Sequence[float], ranks: Sequence[int],
    token_weights: Tensor | None,
) -> None:  # fmt: skip
    """Check arguments of `gated_output`, and tell the kernels which libraries multiply.

    Once for all arguments that look alike: it takes the host a third of what the op does.
    """
    looks = [
        (each.shape, each.dtype, each.device, each.requires_grad)
        if isinstance(each, Tensor)
        else each
        for each in (x, stacked, up, gate, context, token_weights, *adapter)
    ]
    key = (kernels.gated_output, torch.get_num_threads(), len(scales), *ranks, *looks)
    if key not in _PREPARED:
        check_output(x, stacked, up, adapter, scales, ranks, token_weights)
        check_gate(x, gate, context, len(ranks))
        choose_libraries(kernels, x, *schema.products(stacked, up, adapted=bool(adapter)))
        _PREPARED.add(key)


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
    return None if kernels.gated_output is None else kernels


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast, where it is on, would hand them to a matrix product."""
    kind = tensors[0].device.type
    # Meta tensors know no autocast. `torch.amp.is_autocast_available` would tell, and breaks a graph of torch 2.11.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors
    )
