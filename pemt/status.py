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
State = Literal["running", "interrupted", "finished", "failed"]


def write_status(folder: Path, state: State, *, step: int) -> None:
    """Write `status.json` whole (rank 0 calls).

    Args:
        state: `interrupted` means saved and to be started again, `failed` that somebody must look.
        step: optimizer steps done.
    """
    status = {
        "state": state,
        "step": step,
        "time": time.time(),  # seconds since 1970
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    # Not synced: it is written every second while a run trains, and a disk may be busy with a checkpoint.
    write_text(folder / STATUS, json.dumps(status) + "\n", synced=False)
