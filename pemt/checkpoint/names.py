"""The checkpoints of a run's folder, by their names: `checkpoint-<step>`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

UNUSABLE = "unusable-"
_NAME = re.compile(r"checkpoint-(\d+)")


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is one of them."""
    return _NAME.fullmatch(name) is not None


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None if it is no such name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """`checkpoint-<step>` folders, oldest first."""
    found = (path for path in output_dir.glob("checkpoint-*") if is_checkpoint_name(path.name))
    return sorted(found, key=lambda path: step_of(path) or 0)


def quarantine(folder: Path) -> Path:
    """Rename a checkpoint that cannot be used, so that it can be inspected; replaces an older one of that name."""
    aside = folder.with_name(f"{UNUSABLE}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside
