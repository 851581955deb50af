"""Dies by kill -9 at one file operation of its saves.

    accelerate launch ... -m tests.launch.killed N pemt's arguments...

The N-th operation, counted from zero over the whole run, is begun and not ended: of what it would
write or remove, half is there. Without an N-th one the run ends as always.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pemt.__main__ import main
from pemt.storage import folders as storage


def die_at(number: int) -> list[str]:
    """Let this process die at a file operation; the names of those that it has begun."""
    begun: list[str] = []

    def fs_op(operation: Callable[..., Any], *arguments: Any) -> None:
        begun.append(operation.__name__)
        if len(begun) <= number:
            operation(*arguments)
            return
        if operation.__name__ in ("save_tensors", "_write"):
            operation(*arguments)
            path = Path(arguments[-1])
            os.truncate(path, path.stat().st_size // 2)
        elif operation.__name__ == "_remove_tree":
            next(iter(Path(arguments[0]).iterdir())).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    storage.fs_op = fs_op
    return begun


if __name__ == "__main__":
    die_at(int(sys.argv.pop(1)))
    main()
