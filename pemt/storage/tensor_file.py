"""A file of tensors in a checked folder, of which each tensor is read when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pemt.storage.manifest import MANIFEST, StorageError, check_file, check_name, described

# Network file systems may hide a new file from other machines for so long (NFS: acdirmax).
VISIBLE_WITHIN_SECONDS = 90.0


@dataclass(frozen=True)
class TensorFile(Mapping[str, Tensor]):
    """Maps a tensor's name to its value on the CPU; holds none of them, and can be sent to other ranks.

    Args:
        path: the safetensors file.
        listed: what the manifest says of it: size, sha256, and dtype and shape by tensor.
    """

    path: Path
    listed: Mapping[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.listed["tensors"]:
            raise KeyError(name)
        return self._read([name])[name]

    def load(self) -> dict[str, Tensor]:
        """All tensors, from one opening of the file: each is a memory mapping, of which Linux allows 65,530."""
        return self._read(self)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{self.path}: cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.listed["tensors"])

    def __len__(self) -> int:
        return len(self.listed["tensors"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes, by name; nothing is read for it."""
        return {name: tuple(each["shape"]) for name, each in self.listed["tensors"].items()}

    def wait_until_visible(self) -> bool:
        """Whether this machine sees the file in its full size, if need be after a while."""
        until = time.monotonic() + VISIBLE_WITHIN_SECONDS
        while not self._is_visible():
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True

    def _is_visible(self) -> bool:
        try:
            # opened, since network file systems remember old sizes
            with self.path.open("rb") as file:
                return file.seek(0, 2) == self.listed["bytes"]
        except OSError:
            return False


def open_tensors(folder: Path, name: str, manifest: Mapping[str, Any]) -> TensorFile:
    """One file of a folder, after its size, checksum and table of contents have been found right.

    Raises:
        StorageError: the manifest does not list the file, or the file is missing, a link, cut or altered.
    """
    check_name(folder / MANIFEST, name)
    path, listed = folder / name, manifest["files"].get(name)
    try:
        check_file(path, listed)
        with safe_open(path, "pt") as file:  # the tensors are mapped, and not read for this
            found = described({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    if found != listed.get("tensors"):
        raise StorageError(f"{path}: holds other tensors than {MANIFEST} lists; it is damaged")
    return TensorFile(path, listed)
