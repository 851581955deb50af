"""`status.json` in a run's folder: what became of the run, for scripts and people."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Literal

from pemt.storage import write_text

STATUS = "status.json"
RunStatus = Literal["running", "interrupted", "finished", "failed"]


def write_status(
    folder: Path, state: RunStatus, *, step: int, checkpoint: int | None = None
) -> None:
    """Write `status.json` atomically (rank 0 calls).

    Args:
        state: `interrupted` means saved and to be resumed, `failed` that somebody must look.
        step: optimizer steps done.
        checkpoint: step of the newest checkpoint that the run has written; None before the first.
    """
    status = {
        "state": state,
        "step": step,
        "checkpoint": checkpoint,
        "time": time.time(),  # seconds since 1970
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    # Not synced: it is written every second while a run trains, and a disk may be busy with a checkpoint.
    write_text(folder / STATUS, json.dumps(status) + "\n", synced=False)


def finished_status(folder: Path) -> str | None:
    """What `status.json` holds of a finished run."""
    try:
        text = (folder / STATUS).read_text(encoding="utf-8")
        return text if json.loads(text)["state"] == "finished" else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def saved_checkpoint(folder: Path) -> int | None:
    """Step of the checkpoint that `status.json` names; None where it names none, or cannot be read."""
    try:
        step = json.loads((folder / STATUS).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None
