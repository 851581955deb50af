"""Folders of tensors, written atomically: under a temporary name, checksummed, fsynced, renamed.

A folder holds safetensors files and a `manifest.json` that lists each file's size and sha256. The
manifest is written last and the folder gets its name after that, so a crash leaves a folder with a
temporary name and nothing else.
"""

from __future__ import annotations

import contextlib
import glob
import operator
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pemt.storage.manifest import MANIFEST, StorageError, listed_file, with_checksum

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY = ".writing-"


def write_folder(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
) -> Path:
    """Write tensors and manifest as one folder, atomically; an older folder of that name is replaced.

    Args:
        folder: its final name.
        files: per file name (`*.safetensors`) its tensors, on the CPU.
        manifest: JSON values; `files` is added to them.

    Raises:
        StorageError: the disk refused; what stood there before still stands.
    """
    write_folders({folder: tensor_writer(files, manifest)})
    return folder


def write_folders(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write several folders: none gets its name before all are complete on the disk.

    A process that is killed between two renames leaves some of them, each whole; the same call then writes the rest.

    Args:
        writers: by a folder's final name what fills it, under a temporary one.

    Raises:
        StorageError: the disk refused; what stood under these names before still stands.
    """
    written: dict[Path, Path] = {}
    folder = Path()
    try:
        for folder, write in writers.items():
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_partial_writes(folder.parent, partial(operator.eq, folder.name))
            temporary = folder.with_name(f"{TEMPORARY}{folder.name}-{os.getpid()}")
            written[folder] = temporary
            fs_op(os.mkdir, temporary)
            write(temporary)
            fs_op(_sync, temporary)
        for folder, temporary in written.items():
            _put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        for temporary in written.values():
            shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{folder}: cannot be written: {reason}") from None


def tensor_writer(
    files: Mapping[str, Mapping[str, Tensor]], manifest: Mapping[str, Any]
) -> Callable[[Path], None]:
    """A writer for `write_folders` of what `write_folder` takes."""

    def write(temporary: Path) -> None:
        listed = {}
        for name, tensors in files.items():
            whole = {key: value.contiguous() for key, value in tensors.items()}
            fs_op(save_tensors, whole, temporary / name)
            fs_op(_sync, temporary / name)
            listed[name] = listed_file(temporary / name, tensors)
        fs_op(_write, with_checksum({**manifest, "files": listed}), temporary / MANIFEST)
        fs_op(_sync, temporary / MANIFEST)

    return write


def move_files(source: Path, names: Sequence[str]) -> Callable[[Path], None]:
    """A writer for `write_folders` that takes files as they are from a folder of the same disk."""
    return partial(_take_files, take=os.rename, source=source, names=names)


def copy_files(source: Path, names: Sequence[str]) -> Callable[[Path], None]:
    """A writer for `write_folders` that copies files as they are."""
    return partial(_take_files, take=shutil.copyfile, source=source, names=names)


def _take_files(
    temporary: Path, *, take: Callable[[Path, Path], Any], source: Path, names: Sequence[str]
) -> None:
    for name in names:
        fs_op(take, source / name, temporary / name)
        fs_op(_sync, temporary / name)


def fs_op(operation: Callable[..., Any], *arguments: Any) -> None:
    """Do one file operation of a write; every one goes through here, so that a test can die at each of them."""
    operation(*arguments)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file for whom the umask says; safetensors alone writes it for its owner only.

    Args:
        tensors: on the CPU, contiguous.
        path: no such file is there yet.
    """
    from safetensors.torch import save_file  # not above: whoever writes a text needs no torch

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def remove_folder(folder: Path) -> None:
    """Remove a folder of tensors; a crash leaves it intact, or under a temporary name."""
    removed = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
    with contextlib.suppress(OSError):  # what cannot be removed stays, and is no reason to stop
        fs_op(os.rename, folder, removed)
    fs_op(_remove_tree, removed)


def recover_interrupted_replace(parent: Path) -> None:
    """Undo what a crash in the middle of replacing a folder left: the old one gets its name again."""
    for kind, name, path in _leftovers(parent):
        if kind == "replaced" and not (parent / name).exists():
            with contextlib.suppress(OSError):  # a disk that is read-only stays as it is
                fs_op(os.rename, path, parent / name)


def remove_partial_writes(parent: Path, mine: Callable[[str], bool]) -> None:
    """Remove what a crash while writing left behind; a replaced folder that lost its successor comes back.

    Args:
        mine: tells by a folder's name whether it is the caller's; another's may be being written right now.
    """
    for kind, name, path in _leftovers(parent):
        if not mine(name):
            continue
        if kind == "replaced" and not (parent / name).exists():
            fs_op(os.rename, path, parent / name)
        else:
            fs_op(_remove_tree, path)


def _leftovers(parent: Path) -> list[tuple[str, str, Path]]:
    """Folders under temporary names: what was being done to it, its name, and the path."""
    found = []
    for path in parent.glob(f"{TEMPORARY}*"):
        rest = path.name.removeprefix(TEMPORARY)
        kind, _, name = rest.partition("-")
        if kind in ("replaced", "removed"):
            found.append((kind, name, path))
        else:  # ends with the process that wrote it
            found.append(("written", rest.rpartition("-")[0], path))
    return found


def _put_in_place(temporary: Path, folder: Path) -> None:
    replaced = folder.with_name(f"{TEMPORARY}replaced-{folder.name}")
    if folder.exists():
        fs_op(os.rename, folder, replaced)
    fs_op(os.rename, temporary, folder)
    fs_op(_sync, folder.parent)
    if replaced.exists():
        fs_op(_remove_tree, replaced)


def write_text(path: Path, text: str, *, synced: bool = True) -> None:
    """Write a text file atomically: under a temporary name, then renamed; one process at a time.

    Args:
        synced: it is to survive a power failure, for which the disk is waited for.
    """
    # One name for all attempts, so that what a crash left is written over by the next.
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    if synced:
        _sync(temporary)
    temporary.replace(path)
    if synced:
        _sync(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for what is to replace a file: it does at the end of the block, or goes where that fails.

    What processes of this machine left that were killed while they replaced the same file, goes too.
    """
    mine = f".{path.name}.{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(mine)}*"):
        process = left.name.removeprefix(mine)
        if process.isdecimal() and not _is_running(int(process)):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{mine}{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's, or no process's number
        return True
    return True


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
