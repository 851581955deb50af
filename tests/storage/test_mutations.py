"""Six hundred ways to damage a folder of tensors, and each is found before a tensor is handed out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pemt.storage import open_tensors
from pemt.storage.folders import write_folder
from pemt.storage.manifest import MANIFEST, StorageError, read_manifest, with_checksum

NAMES = ("trained.safetensors", "moments.safetensors")
EACH = 100

Mutation = Callable[[Path, random.Random], None]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder as a run leaves it, and beside it one of another step."""
    for step in (5, 6):
        files = {name: {"a": torch.randn(40, 3), "b": torch.arange(9) + step} for name in NAMES}
        manifest = {"format": 2, "run": {"task": "x"}, "progress": {"step": step, "best": 71.25}}
        write_folder(tmp_path / f"checkpoint-{step}", files, manifest)
    return tmp_path / "checkpoint-5"


def read(folder: Path) -> list[dict[str, torch.Tensor]]:
    manifest = read_manifest(folder)
    return [dict(open_tensors(folder, name, manifest)) for name in NAMES]


def any_file(folder: Path, draw: random.Random) -> Path:
    return folder / draw.choice((*NAMES, MANIFEST))


def flip(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def extend(folder: Path, draw: random.Random) -> None:
    path = any_file(folder, draw)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 40)))


def delete_or_link(folder: Path, draw: random.Random) -> None:
    """A missing file, or a link to a good one elsewhere in its place."""
    path = any_file(folder, draw)
    if draw.random() < 0.5:
        path.unlink()
    else:
        elsewhere = path.rename(folder.parent / f"moved-{path.name}")
        path.symlink_to(elsewhere)


def swap(folder: Path, draw: random.Random) -> None:
    """Two files change places, or one comes from another checkpoint: each is whole in itself."""
    if draw.random() < 0.3:
        first, second = (folder / name for name in draw.sample((*NAMES, MANIFEST), 2))
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)
    else:
        name = draw.choice((*NAMES, MANIFEST))
        shutil.copy(folder.with_name("checkpoint-6") / name, folder / name)


def edit_manifest(folder: Path, draw: random.Random) -> None:
    """Another value, a key less or a key more, somewhere in the JSON."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(manifest)
    holder, key = draw.choice(places)
    how = draw.randrange(3)
    if how == 0:
        holder[key] = draw.choice([None, -1, 2**60, "../../x", "", [], {}])
    elif how == 1:
        del holder[key]
    elif isinstance(holder, dict):
        holder["../x"] = holder[key]
    else:
        holder.append(7)
    path.write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize("mutate", [flip, truncate, extend, delete_or_link, swap, edit_manifest])
def test_every_mutation_is_found(whole: Path, tmp_path: Path, mutate: Mutation) -> None:
    assert len(read(whole)) == 2
    original = {path.name: path.read_bytes() for path in whole.iterdir()}
    for seed in range(EACH):
        mutate(whole, random.Random(seed))
        with pytest.raises(StorageError) as raised:
            read(whole)
        assert "\n" not in str(raised.value)
        assert str(whole) in str(raised.value)
        for name, data in original.items():
            (whole / name).unlink(missing_ok=True)
            (whole / name).write_bytes(data)
    assert len(read(whole)) == 2


def test_a_sealed_lie_about_the_tensors_is_found(whole: Path) -> None:
    """Even one that knows how to seal: names, shapes and dtypes are held against the file."""
    manifest = read_manifest(whole)
    for change in ({"shape": [3, 40]}, {"dtype": "float16"}, {"shape": [2**60]}):
        told = json.loads(json.dumps(manifest))
        told["files"][NAMES[0]]["tensors"]["a"] |= change
        (whole / MANIFEST).write_text(with_checksum(told))
        with pytest.raises(StorageError, match="holds other tensors"):
            read(whole)


@pytest.mark.parametrize("name", ["../checkpoint-6/trained.safetensors", "/etc/passwd", "a/../b"])
def test_names_in_a_manifest_are_no_paths(whole: Path, name: str) -> None:
    manifest = read_manifest(whole)
    manifest["files"][name] = manifest["files"][NAMES[0]]
    (whole / MANIFEST).write_text(with_checksum(manifest))
    with pytest.raises(StorageError, match="no plain name"):
        read(whole)
    with pytest.raises(StorageError, match="no plain name"):
        open_tensors(whole, name, manifest)


def test_a_huge_manifest_is_not_read(whole: Path) -> None:
    with (whole / MANIFEST).open("ab") as file:
        file.truncate(1 << 40)  # a sparse terabyte: reading it would be the end of the process
    with pytest.raises(StorageError, match="a manifest has 16777216 at most"):
        read_manifest(whole)
