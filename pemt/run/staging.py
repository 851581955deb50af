"""Base and data that are folders, copied to a node's own disk and read there.

`PEMT_STAGE_DIR` names the disk; the SLURM launchers set it. The run's configuration keeps the folders that it was
given, so that it resumes with or without.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.checkpoint import Config
from pemt.config import PemtError
from pemt.engine import Engine
from pemt.monitor import progress_logger

STAGE_DIR = "PEMT_STAGE_DIR"
STAGED = ("model_name_or_path", "tokenizer_name", "data_dir")
# One job of a node at a time copies; launchers/slurm_common.sh takes the same one.
LOCK = "pemt.lock"
# What stands beside the weights on the hub, and is never read.
UNREAD = (".git", ".cache", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite")


class StagingError(PemtError):
    """A folder that cannot be copied to a node's own disk."""


def staged(config: Config, engine: Engine) -> Config:
    """The configuration to read base, tokenizer and data by: of their folders' copies, where such are wanted.

    One rank of a machine copies; all ranks call, whether or not their machine has `PEMT_STAGE_DIR`.

    Raises:
        StagingError: the disk is full, or refuses.
    """
    place = os.environ.get(STAGE_DIR)
    copies: dict[str, Any] = {}
    with engine.local_first(f"copying to {place}" if place else "looking for copies"):
        if place:
            for field in STAGED:
                name = getattr(config, field)
                if name is not None and Path(name).is_dir():
                    unread = () if field == "data_dir" else UNREAD
                    copies[field] = str(copy_of(Path(name), Path(place), unread=unread))
    return replace(config, **copies)


def copy_of(folder: Path, place: Path, *, unread: tuple[str, ...] = ()) -> Path:
    """The copy of a folder as it is now; made once, and again where a file has changed since.

    Args:
        folder: links in it are followed.
        place: holds the copies; made where it is not there.
        unread: patterns of names that are left out; and weights of torch's own format where safetensors are there.

    Raises:
        StagingError: as `staged`.
    """
    folder, place = folder.resolve(), place.expanduser().resolve()
    if folder.is_relative_to(place):
        return folder  # somebody has staged it already
    if unread and any(folder.glob("*.safetensors")):
        unread = (*unread, "pytorch_model*")
    ignore = shutil.ignore_patterns(*unread)
    try:
        listed, size = _listing(folder, ignore)
        copy = place / f"pemt-{folder.name}-{listed}"
        place.mkdir(parents=True, exist_ok=True)
        with (place / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_dir():
                part = copy.with_name(f"{copy.name}.part")
                shutil.rmtree(part, ignore_errors=True)  # of a job that was killed
                try:
                    shutil.copytree(folder, part, ignore=ignore)
                    part.rename(copy)
                except BaseException:
                    shutil.rmtree(part, ignore_errors=True)
                    raise
                message = f"{folder} is copied to {copy} ({size / 1e9:.3g} GB)"
                progress_logger().info(f"{socket.gethostname()}: {message}")
    except OSError as error:
        # copytree tells of all files that it could not copy
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise StagingError(
            f"{STAGE_DIR}: {folder} cannot be copied to {place} on {socket.gethostname()}: {reason}; free some "
            "room there, or leave STAGE_DIR out and the folder is read where it lies"
        ) from None
    return copy


def _listing(folder: Path, ignore: Callable[[str, list[str]], set[str]]) -> tuple[str, int]:
    """A digest of the names, sizes and times of a folder's files, and their bytes."""
    digest, total = hashlib.sha256(str(folder).encode()), 0
    for path, folders, files in os.walk(folder, followlinks=True):
        skipped = ignore(path, [*folders, *files])
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in sorted(set(files) - skipped):
            file = Path(path, name)
            status = file.stat()
            digest.update(
                f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode()
            )
            total += status.st_size
    return digest.hexdigest()[:12], total
