"""`pemt` and `python -m pemt`: a table of contents, no logic."""

from __future__ import annotations

import os
import sys
import time

from pemt.arguments import nearest
from pemt.commands import COMMANDS
from pemt.commands.overview import overview
from pemt.config import PemtError
from pemt.signals import INTERRUPTED_STATUS, Interrupted


def main() -> None:
    """Run one command.

    A user's error is one line on stderr, from one rank, and exit status 2; a run that was told to stop
    and has saved leaves with 75.
    """
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print(overview(), end="")
        return
    status = 0
    try:
        if name not in COMMANDS:
            hint = nearest(name, list(COMMANDS), what=f"there are {', '.join(COMMANDS)}")
            raise PemtError(f"pemt {name}: no such command{hint}")
        COMMANDS[name](arguments)
    except PemtError as error:
        complain(error)
        # Not sys.exit: a rank that waits for the others at exit would hold the job up.
        os._exit(2)
    except Interrupted:
        status = INTERRUPTED_STATUS
    if "pemt.engine" in sys.modules:
        sys.modules["pemt.engine"].shut_down()
    if status:
        sys.exit(status)


def complain(error: PemtError) -> None:
    """Print the error on rank 0; another rank prints only if rank 0 has not ended the job by then."""
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(5)
    print(f"pemt: error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
