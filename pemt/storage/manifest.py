"""The manifest of a folder of tensors: what lies there, and its own checksum, to detect a damaged manifest too.

`manifest.json` lists by file its size, sha256 and tensors, beside whatever its writer adds. Its last
key is the sha256 of all the others: a changed byte anywhere in it is found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pemt.config import PemtError

if TYPE_CHECKING:  # a manifest is read without torch
    from torch import Tensor

MANIFEST = "manifest.json"
CHECKSUM = "sha256"
# A manifest is read into memory; the largest of ours (every parameter of T5-XXL, by name) are under a megabyte.
MOST_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class StorageError(PemtError):
    """A folder that cannot be written, or is not what its manifest says."""


def with_checksum(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest's file, with its own checksum."""
    body = json.dumps(manifest, indent=2)
    checksum = hashlib.sha256(body.encode("utf-8")).hexdigest()
    return json.dumps({**manifest, CHECKSUM: checksum}, indent=2) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, without its own checksum.

    Raises:
        StorageError: missing, malformed, or changed since it was written.
    """
    path = folder / MANIFEST
    manifest, text = _parsed(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise StorageError(f"{path}: found no object with `files`; it is no manifest of pemt")
    if manifest.pop(CHECKSUM, None) is None:
        raise StorageError(
            f"{path}: has no `{CHECKSUM}` of its own; it was written by another version"
        )
    if with_checksum(manifest) != text:
        raise StorageError(
            f"{path}: checksum mismatch (of its own {CHECKSUM}); it is damaged, or was edited by hand"
        )
    for name in manifest["files"]:
        check_name(path, name)
    return manifest


def _parsed(path: Path) -> tuple[Any, str]:
    try:
        check_plain(path)
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise StorageError(f"{path}: has {size} bytes, a manifest has {MOST_BYTES} at most")
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    try:
        return json.loads(text), text
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise StorageError(f"{path}: malformed JSON: {error}") from None


def listed_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a manifest says of one written file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path), "tensors": described(tensors)}


def check_file(path: Path, listed: Any) -> None:
    """Hold a file against what its manifest lists, before any of it is taken for tensors.

    Raises:
        StorageError: it is not listed, a link, or of another size or content.
        OSError: it cannot be read.
    """
    if not isinstance(listed, dict):
        raise StorageError(f"{path.parent / MANIFEST}: lists no file `{path.name}`")
    check_plain(path)
    if path.stat().st_size != listed.get("bytes") or sha256(path) != listed.get("sha256"):
        raise StorageError(
            f"{path}: checksum mismatch (size or sha256 is not what {MANIFEST} lists); the file is damaged"
        )


def check_name(path: Path, name: str) -> None:
    """Refuse a file's name that would lead out of its folder; `path` is where it was read.

    Raises:
        StorageError: it is no plain name.
    """
    if _NAME.fullmatch(name) is None:
        raise StorageError(f"{path}: files: found `{name}`, which is no plain name of a file")


def check_plain(path: Path) -> None:
    """Refuse a link in a file's place: it could name anything on the machine.

    Raises:
        StorageError: it is one.
    """
    if path.is_symlink():
        raise StorageError(
            f"{path}: is a symbolic link, and only regular files are read; copy the file there"
        )


def described(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Dtype and shape of tensors, by name, as a manifest lists them."""
    return {
        key: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        for key, tensor in tensors.items()
    }


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
