from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from pemt.ops import select
from pemt.ops.library import CSRC, Library, load

HERE = Path(__file__).parent
IMPLEMENTATIONS = ("reference", "packed", "cpu", "cuda on the host")


@functools.cache
def cuda_on_host() -> select.Kernels:
    """The CUDA sources, kernels and binding, compiled for the host over `cuda_emulation.h`."""
    library = Library(
        name="emulated",
        sources=(CSRC / "ops.cpp", HERE / "cuda_on_host.cpp"),
        machines="the host",
        flags=("-O1", "-DPEMT_LIBRARY=pemt_emulated", "-fvisibility=hidden"),
        include_paths=(CSRC, HERE),
    )
    load(library)
    return select.Kernels.of(getattr(torch.ops, library.namespace))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that runs here, forced for the whole test."""
    if request.param == "cuda on the host":
        monkeypatch.setitem(select.ANY_DEVICE, request.param, cuda_on_host())
    monkeypatch.setenv("PEMT_OPS", request.param)
    return request.param
