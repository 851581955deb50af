"""A pickle that does something when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Evil:
    """Makes this call when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> Any:
        return self.reduced
