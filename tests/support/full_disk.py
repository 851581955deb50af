"""A run on a disk of its own that is full from one step to another, for test_full_disk.py.

    unshare --mount --map-root-user python -m tests.support.full_disk FOLDER MEGABYTES pemt's arguments...

The disk is mounted on FOLDER, in which the run's output folder lies; what the run leaves is copied to FOLDER-left.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from pemt.__main__ import main
from pemt.run.nan_guard import NonFiniteGuard

FULL_AFTER, FREE_AFTER = (
    3,
    28,
)  # the files of a run have room to their page's end: not all are refused at once


def fill(path: Path) -> None:
    try:
        with path.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return


def run(folder: Path, megabytes: str) -> None:
    disk = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(disk, check=True)
    filler = folder / "filler"

    def between_steps(_: NonFiniteGuard, step: int, *__: object) -> bool:
        if FULL_AFTER <= step < FREE_AFTER:
            fill(filler)
        if step == FREE_AFTER:
            filler.unlink()
        return False

    with mock.patch.object(NonFiniteGuard, "check", between_steps):
        main()
    shutil.copytree(folder, f"{folder}-left", ignore=lambda *_: ["filler"])


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)), sys.argv.pop(1))
