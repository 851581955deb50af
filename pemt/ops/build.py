"""What `pemt ops build` and `pemt ops info` do: compile ahead of a run, and show what would run."""

from __future__ import annotations

import json
import os

import torch

from . import library, products, select
from .checks import OpsError


def build_all() -> list[str]:
    """Compile every library that this PyTorch can use; one line about each.

    A cluster's login node does it, so that no rank of a run has to.

    Raises:
        OpsError: a library that should build does not.
    """
    lines = []
    for name, make in library.LIBRARIES.items():
        if name == "cuda" and torch.version.cuda is None:
            lines.append("cuda: skipped, this PyTorch has no CUDA")
            continue
        found = make()
        library.build(found)
        lines.append(f"{name}: {_state(found)}")
    return lines


def describe() -> list[str]:
    """Which libraries are built, for which machines, which multiply fastest here, and what runs on each device."""
    lines = [f"PyTorch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"]
    for name, make in library.LIBRARIES.items():
        try:
            lines.append(f"{name} library: {_state(make())}")
        except OpsError as error:
            lines.append(f"{name} library: {error}")
    forced = os.environ.get("PEMT_OPS", "")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = [f"{device} tensors: {_choice(device, forced)}" for device in devices]
    return [*lines, *products.describe(), *chosen]


def _state(found: library.Library) -> str:
    if not found.built.exists():
        return f"not built yet; `pemt ops build`, or the first use, builds it into {found.folder}"
    record = json.loads(found.built.read_text())
    return f"built for {found.machines} in {record['seconds']} s, in {found.folder}"


def _choice(device: str, forced: str) -> str:
    if forced:
        try:
            select.kernels_for(torch.empty(0, device=device))
        except OpsError as error:
            return f"an error: {error}"
        return f"{forced}, forced by PEMT_OPS"
    try:
        built = library.LIBRARIES[device]().built.exists()
    except OpsError as error:
        return f"packed (plain PyTorch), because {error}"
    return f"{device} kernels, {'built' if built else 'to be built at first use'}"
