"""PEMT: a frozen T5 adapted to a new task by mixing experts learned on other tasks.

What is listed here is the public interface; importing it costs nothing until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pemt.config import AdaptConfig, PemtError, SourceConfig
    from pemt.publish import PemtModel, export_run
    from pemt.run import run_adapt, run_source

__all__ = [
    "AdaptConfig",
    "PemtError",
    "PemtModel",
    "SourceConfig",
    "export_run",
    "run_adapt",
    "run_source",
]

_HOMES = {
    "AdaptConfig": "pemt.config",
    "PemtError": "pemt.config",
    "PemtModel": "pemt.publish.pemt_model",
    "SourceConfig": "pemt.config",
    "export_run": "pemt.publish.export",
    "run_adapt": "pemt.run.train",
    "run_source": "pemt.run.train",
}


if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'pemt' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
