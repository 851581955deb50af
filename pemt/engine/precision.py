"""Which precision a run computes in: bf16 where the device has it natively, and what it costs where it has not."""

from __future__ import annotations

import functools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from pemt.config import RunConfig

_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}
# What ONEDNN_MAX_CPU_ISA can name below bf16; it ignores a word that it does not know.
_ISA_BELOW = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
# One projection of t5-base's FFN over so many tokens: long enough to be measured, on either device.
_IN, _OUT = 768, 3072
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 64, 16_384


def bf16_is_native(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices itself: a GPU from sm_80 on, a CPU with avx512_bf16 or amx_bf16.

    Of a CPU it says what PyTorch and oneDNN may use: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA can take it away.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    named = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")]
    return (
        bool(_CPU_FLAGS & _flags_of_cpu())
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and torch.backends.mkldnn.is_available()
        and not _ISA_BELOW & {name.upper() for name in named}
    )


def _flags_of_cpu() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def resolve_precision(config: RunConfig, *, native: bool) -> RunConfig:
    """The configuration with `bf16` decided, where it is left to the device."""
    if config.bf16 is not None:
        return config
    return replace(config, bf16=native and not config.fp16)


def precision_text(config: RunConfig, *, native: bool) -> str:
    """A run's precision in a few words, and whether the devices have bf16."""
    if config.fp16:
        return "fp16"
    computed = "native" if native else "emulated"
    return f"bf16 ({computed} here)" if config.bf16 else f"fp32 (bf16 would be {computed} here)"


@functools.cache
def warn_of_emulation(device: torch.device) -> None:
    """Warn, once in a process, of a run in emulated bf16: what a product takes in it, and in fp32."""
    tokens = _TOKENS_ON_CPU if device.type == "cpu" else _TOKENS_ON_GPU
    half, single = (product_ms(device, dtype, tokens) for dtype in (torch.bfloat16, torch.float32))
    print(
        f"pemt: warning: bf16: this device ({device.type}) emulates it: a product of {tokens:,} x {_IN} "
        f"by {_IN} x {_OUT} takes {half:.1f} ms in bf16 and {single:.1f} ms in fp32, measured just now; --bf16 false "
        "computes in fp32",
        file=sys.stderr,
        flush=True,
    )


def product_ms(device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Milliseconds of one projection of t5-base's FFN, the best of two after one that is not counted."""
    x_TI = torch.ones(tokens, _IN, dtype=dtype, device=device)
    weight_OI = torch.ones(_OUT, _IN, dtype=dtype, device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        (x_TI @ weight_OI.t()).sum().item()  # a number on the host: the product is done
        times.append(1e3 * (time.perf_counter() - started))
    return min(times[1:])
