"""Bars as a notebook shows them: its stdout is no terminal, and yet somebody looks."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm


def in_notebook() -> bool:
    """Whether what is printed stands below a notebook's cell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def bar_class() -> Any:
    """tqdm's bar: a notebook's own where it has widgets, else of characters, which a cell shows as well."""
    if in_notebook() and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm as widget

        return widget
    return tqdm
