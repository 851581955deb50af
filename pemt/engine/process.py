"""Processes as the operating system knows them: memory of this one, which one another is, when it began."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# who asks when a process began has no torch yet; imported below where a GPU is asked
if TYPE_CHECKING:
    import torch


def memory_in_use(device: torch.device) -> dict[str, float]:
    """GB (1e9 bytes): resident now, the most resident so far, and of a GPU the most allocated so far."""
    now, peak = _resident(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The kernel takes down a new peak a little late.
    used = {"memory/rss_gb": now / 1e9, "memory/peak_rss_gb": max(now, peak) / 1e9}
    if device.type == "cuda":
        import torch

        used["memory/peak_cuda_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return used


def watch_peak(device: torch.device) -> int:
    """Bytes held now, after all that can be returned has been; `peak` counts from here.

    Of a GPU what PyTorch has allocated, of a CPU what is resident (Linux alone).
    """
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident()


def peak(device: torch.device) -> int:
    """The most bytes held since `watch_peak`."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(kilobytes)


def _resident() -> int:
    """Bytes, which the kernel counts in pages."""
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process, told from every other one of any host and time.

    Args:
        started: when it began, in the kernel's ticks: process ids are given out again.
    """

    host: str
    pid: int
    started: int

    def is_on_this_host(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether it is on this host and still the one that started."""
        return self.is_on_this_host() and start_ticks(self.pid) == self.started


def this_process() -> ProcessId:
    """The one that calls."""
    pid = os.getpid()
    return ProcessId(host=socket.gethostname(), pid=pid, started=start_ticks(pid) or 0)


def start_ticks(pid: int) -> int | None:
    """When a process of this host began, in ticks since boot; None if it is not alive."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie only waits to be counted


def launcher_began(marked_by: str) -> float | None:
    """When the launcher of this process began, in seconds since 1970; None where that cannot be known.

    It is the nearest ancestor without the variable that it sets: what it starts may be wrapped in a script.
    """
    pid = os.getppid()
    while pid > 0:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return None
        if not any(each.startswith(f"{marked_by}=".encode()) for each in variables):
            began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after the machine
            return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + began
        pid = int(fields[1])
    return None
