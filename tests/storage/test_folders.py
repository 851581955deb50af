"""Folders of tensors: whole or not there, and never read when damaged."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from pemt.storage import StorageError, folders as storage, open_tensors, read_manifest
from pemt.storage.folders import (
    move_files,
    replacing,
    write_folder,
    write_folders,
    write_text,
)


def written(folder: Path, value: float = 1.0) -> Path:
    return write_folder(folder, {"a.safetensors": {"w": torch.full((64,), value)}}, {"format": 1})


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    folder = written(tmp_path / "entry")
    manifest = read_manifest(folder)
    assert manifest["format"] == 1
    assert torch.equal(open_tensors(folder, "a.safetensors", manifest)["w"], torch.ones(64))
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_whom_the_umask_lets_read_may_read(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        folder = written(tmp_path / "entry")
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "a.safetensors": mode,
        "manifest.json": mode,
    }


def test_every_flipped_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    folder = written(tmp_path / "entry")
    path, manifest = folder / "a.safetensors", read_manifest(folder)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(StorageError, match="damaged"):
            open_tensors(folder, "a.safetensors", manifest)
        path.write_bytes(whole[:position])
        with pytest.raises(StorageError, match="damaged"):
            open_tensors(folder, "a.safetensors", manifest)
    path.unlink()
    with pytest.raises(StorageError, match=r"a\.safetensors"):
        open_tensors(folder, "a.safetensors", manifest)


@pytest.mark.parametrize("step", ["save_tensors", "_sync", "_put_in_place"])
def test_a_crash_while_replacing_keeps_the_old(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "entry", 1.0)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, step, crash)
    with pytest.raises(KeyboardInterrupt):
        written(folder, 2.0)
    monkeypatch.undo()
    assert open_tensors(folder, "a.safetensors", read_manifest(folder))["w"][0] == 1.0
    written(folder, 3.0)
    assert [path.name for path in tmp_path.iterdir()] == ["entry"], "leftovers stayed"


def test_a_crash_between_the_renames_brings_the_old_one_back(tmp_path: Path) -> None:
    folder = written(tmp_path / "entry", 1.0)
    folder.rename(tmp_path / f"{storage.TEMPORARY}replaced-entry")
    storage.remove_partial_writes(tmp_path, lambda name: name == "entry")
    assert open_tensors(folder, "a.safetensors", read_manifest(folder))["w"][0] == 1.0


def test_anothers_unfinished_folder_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f"{storage.TEMPORARY}superglue-rte-77"
    other.mkdir()
    written(tmp_path / "rte")
    assert other.exists()


def test_a_full_disk_is_an_error_for_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_tensors", full)
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        written(tmp_path / "entry")
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_written_whole_and_a_crash_leaves_nothing_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "config.yaml", []
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process, after the crash
    sync = storage._sync
    monkeypatch.setattr(storage, "_sync", lambda path: (synced.append(path), sync(path)))
    write_text(path, "newer")
    assert [each.name for each in tmp_path.iterdir()] == ["config.yaml"], "a leftover"
    assert path.read_text() == "newer"
    assert len(synced) == 2
    assert synced[-1] == tmp_path, "the new name is on the disk too"


def test_what_a_killed_process_left_goes_when_the_file_is_replaced(tmp_path: Path) -> None:
    path, here = tmp_path / "answers.jsonl", socket.gethostname()
    child = subprocess.Popen(["true"])
    child.wait()  # a number that no process has now
    kept = {
        f".answers.jsonl.{here}-{os.getppid()}": "under way",
        f".answers.jsonl.elsewhere-{child.pid}": "another machine's",
        f".answers.jsonl.{here}-x": "something else",
        f".answers.json.{here}-{child.pid}": "another file's",
    }
    for name in (*kept, f".answers.jsonl.{here}-{child.pid}"):
        (tmp_path / name).touch()
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert {each.name for each in tmp_path.iterdir()} == {path.name, *kept}


def test_several_folders_are_there_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation on the disk is refused once: what was there before is there again, or all is new."""
    bank, fs_op = tmp_path / "bank", storage.fs_op
    files = ("a.safetensors", storage.MANIFEST)
    before_the_first_name = 2 * (1 + 2 * len(files) + 1)  # make, rename and sync each file, sync

    def values() -> dict[str, float]:
        found = {}
        for folder in bank.glob("[!.]*"):
            tensors = open_tensors(folder, files[0], read_manifest(folder))
            found[folder.name] = tensors["w"][0].item()
        return found

    def refused_at(at: int) -> bool:
        calls = count()

        def refuse(operation: Any, *arguments: Any) -> None:
            if next(calls) == at:
                raise OSError(28, "No space left on device")
            fs_op(operation, *arguments)

        for folder in (bank, tmp_path / "coming"):
            shutil.rmtree(folder, ignore_errors=True)
        written(bank / "old", 1.0)
        sources = {bank / name: written(tmp_path / "coming" / name, 2.0) for name in ("old", "new")}
        with monkeypatch.context() as patch:
            patch.setattr(storage, "fs_op", refuse)
            try:
                write_folders({each: move_files(source, files) for each, source in sources.items()})
            except StorageError:
                return True
        return False

    at = 0
    while refused_at(at):
        storage.recover_interrupted_replace(bank)
        if at < before_the_first_name:
            assert values() == {"old": 1.0}
            assert [each.name for each in bank.glob(".*")] == []
        assert values() in ({"old": 1.0}, {"old": 2.0}, {"old": 2.0, "new": 2.0})
        at += 1
    assert at > before_the_first_name
    assert values() == {"old": 2.0, "new": 2.0}
    assert [each.name for each in bank.glob(".*")] == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": 1}', "\x00"])
def test_a_malformed_manifest_is_an_error_for_people(tmp_path: Path, text: str) -> None:
    folder = written(tmp_path / "entry")
    (folder / storage.MANIFEST).write_text(text)
    with pytest.raises(StorageError, match=r"manifest\.json"):
        read_manifest(folder)
