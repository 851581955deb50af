"""Memory of this process, as the operating system and CUDA count it."""

from __future__ import annotations

import resource
import sys

import torch


def memory_in_use(device: torch.device) -> dict[str, float]:
    """GB (1e9 bytes): resident now, the most resident so far, and of a GPU the most allocated so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    now = _resident() or peak
    # The kernel takes down a new peak a little late.
    used = {"memory/rss_gb": now / 1e9, "memory/peak_rss_gb": max(now, peak) / 1e9}
    if device.type == "cuda":
        used["memory/peak_cuda_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return used


def _resident() -> int:
    """Bytes; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
