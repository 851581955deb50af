"""`pemt` and `python -m pemt`: a table of contents, no logic."""

from __future__ import annotations

from pemt.engine import leave_working_folder, open_streams, use_writable_caches

leave_working_folder()  # before a file there can stand for a module imported below

import os
import select
import signal
import sys
import time

from pemt.commands import COMMANDS
from pemt.commands.overview import overview
from pemt.config import PemtError, nearest, other_distribution, version_line
from pemt.engine import INTERRUPTED_STATUS, KILLED_STATUS, Interrupted, finish, run_and_exit


def program() -> None:
    """What `pemt` is on a command line."""
    open_streams()
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that are started from here leave it too
    run_and_exit(main)


def main() -> None:
    """Run one command.

    A user's error is one line on stderr, from one rank, and exit status 2; a run that was told to stop
    and has saved leaves with 75; one whose reader has gone, as in `pemt predict ... | head`, as if by SIGPIPE; one that
    has nothing to save and is interrupted, with 130.
    """
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print(overview(), end="")
        return
    if name == "--version":
        print(version_line())
        if other := other_distribution():
            print(f"pemt: warning: {other}", file=sys.stderr)
        return
    status = 0
    try:
        if name not in COMMANDS:
            hint = nearest(name, list(COMMANDS), what=f"there are {', '.join(COMMANDS)}")
            raise PemtError(f"pemt {name}: no such command{hint}")
        find_caches()
        COMMANDS[name](arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not reader_has_gone():
            raise
        os._exit(128 + signal.SIGPIPE)
    except PemtError as error:
        complain(error)
        # Not sys.exit: a rank that waits for the others at exit would hold the job up.
        os._exit(2)
    except KeyboardInterrupt:
        os._exit(KILLED_STATUS)
    except Interrupted:
        status = INTERRUPTED_STATUS
    finish()
    if status:
        sys.exit(status)


def find_caches() -> None:
    """Raise `PemtError` where neither home nor a temporary folder can be written."""
    try:
        use_writable_caches()
    except OSError as error:
        raise PemtError(
            f"no cache can be written ({error}); set HF_HOME, or TMPDIR, to a folder that can be"
        ) from None


def reader_has_gone() -> bool:
    """Whether nobody reads what stands on stdout any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def complain(error: PemtError) -> None:
    """Print the error on rank 0; another rank prints only if rank 0 has not ended the job by then."""
    if int(os.environ.get("RANK", "0")) != 0:
        time.sleep(5)
    print(f"pemt: error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    program()
