"""The CUDA kernels on a machine without GPU: their sources compiled for the host."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from pemt.ops import select
from pemt.ops.library import BINDING, CSRC, Library, load

HERE = Path(__file__).parent


@functools.cache
def cuda_on_host() -> select.Kernels:
    """The CUDA sources, kernels and binding, compiled for the host over `cuda_emulation.h`."""
    library = Library(
        name="emulated",
        sources=(*BINDING, CSRC / "cpu_few_rows.cpp", HERE / "cuda_on_host.cpp"),
        machines="the host",
        # A GPU faults where a wide access is not aligned, a host does not: the sanitizer traps there.
        flags=(
            *("-O1", "-DPEMT_LIBRARY=pemt_emulated", "-fvisibility=hidden"),
            *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"),
        ),
        include_paths=(CSRC, HERE),
    )
    load(library)
    return select.Kernels.of(getattr(torch.ops, library.namespace))
