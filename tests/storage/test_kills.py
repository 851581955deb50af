"""A process that writes checkpoints is killed at random instants: none that is published is bad.

SIGKILL takes the process, not the machine: what the kernel holds still reaches the disk. That every file is
synced before its folder gets its name is seen by the order of the calls, in the last test.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pemt.storage import StorageError, folders as storage, open_tensors, read_manifest
from pemt.storage.folders import write_folder
from pemt.storage.manifest import MANIFEST, listed_file

KILLS = [15, pytest.param(200, marks=pytest.mark.soak)]
LONGEST_LIFE = 0.06  # seconds: a write takes 5 to 20 ms here, so each child dies in its first few
NAMES = ("trained.safetensors", "moments.safetensors")

Writer = Callable[[Path, int], None]


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"w": torch.full((20_000,), float(step))} for name in NAMES}


def ours(root: Path, step: int) -> None:
    """A bank entry written over the one before, and a new checkpoint."""
    write_folder(root / "entry", tensors(step), {"step": step})
    write_folder(root / f"checkpoint-{step}", tensors(step), {"step": step})


def naive(root: Path, step: int) -> None:
    """The same content, written where it is to stay."""
    for folder in (root / "entry", root / f"checkpoint-{step}"):
        folder.mkdir(exist_ok=True)
        files = {}
        for name, content in tensors(step).items():
            save_file(content, folder / name)
            files[name] = listed_file(folder / name, content)
        text = storage.with_checksum({"step": step, "files": files})
        (folder / MANIFEST).write_text(text)


def write_for_ever(writer: Writer, root: Path, first: int, ready: Connection) -> None:
    torch.set_num_threads(1)
    ready.send(None)
    for step in count(first):
        writer(root, step)


def published(root: Path) -> Iterator[Path]:
    for path in root.iterdir():
        if not path.name.startswith("."):
            yield path


def is_bad(folder: Path) -> bool:
    """Whether a reader would refuse it, or take it for what it is not."""
    try:
        manifest = read_manifest(folder)
        values = [open_tensors(folder, name, manifest)["w"] for name in NAMES]
    except StorageError:
        return True
    return any(value.tolist() != [float(manifest["step"])] * 20_000 for value in values)


def kill_while_writing(writer: Writer, root: Path, kills: int) -> dict[str, int]:
    """Kill that many writers; what was found between the kills."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch", "pemt.storage"])
    draw = random.Random(0)
    found = {"bad": 0, "lost": 0, "whole": 0, "cut short": 0}
    writer(root, 0)
    step = 1
    for _ in range(kills):
        here, there = context.Pipe()
        child = context.Process(target=write_for_ever, args=(writer, root, step, there))
        child.start()
        there.close()  # so that a writer that does not come up is an error here and no endless wait
        here.recv()
        time.sleep(draw.uniform(0, LONGEST_LIFE))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found["cut short"] += any(path.name.startswith(".") for path in root.iterdir())
        storage.recover_interrupted_replace(root)
        found["lost"] += not (root / "entry").exists()
        for folder in published(root):
            bad = is_bad(folder)
            found["bad" if bad else "whole"] += 1
            if folder.name != "entry":
                step = max(step, int(folder.name.removeprefix("checkpoint-")) + 1)
            if bad or folder.name != "entry":
                shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("kills", KILLS)
def test_no_kill_publishes_a_bad_checkpoint(tmp_path: Path, kills: int) -> None:
    found = kill_while_writing(ours, tmp_path, kills)
    assert found["bad"] == 0
    assert found["lost"] == 0, "an entry that was being replaced is gone"
    assert found["whole"] > kills
    assert found["cut short"] > kills // 4, "the kills did not fall into writes"


def test_the_same_kills_find_a_naive_writer_out(tmp_path: Path) -> None:
    found = kill_while_writing(naive, tmp_path, 10)
    assert found["bad"] > 0, found


def test_everything_is_synced_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.rename

    def watched_sync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def watched_rename(old: Any, new: Any, **more: Any) -> None:
        calls.append(f"-> {Path(new).name}")
        rename(old, new, **more)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "rename", watched_rename)
    write_folder(tmp_path / "entry", tensors(1), {"step": 1})
    named = calls.index("-> entry")
    aside = f"{storage.TEMPORARY}entry-{os.getpid()}"
    assert set(calls[:named]) == {*NAMES, MANIFEST, aside}
    assert calls[named - 1] == aside, "the folder's own list of files comes after its files"
    assert calls[named + 1 :] == [tmp_path.name], "the new name is synced too"
    assert json.loads((tmp_path / "entry" / MANIFEST).read_text())["step"] == 1
