"""What can happen to the newest of three checkpoints, `checkpoint-6`, and what is told of it.

Each takes that checkpoint's folder, and the folder of a run with another data_seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pemt.storage.manifest import MANIFEST

Damage = Callable[[Path, Path], None]


def flip_a_bit(path: Path) -> None:
    """Of a number in the last tensor of a file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.write_bytes(data)


def flip(checkpoint: Path, _: Path) -> None:
    flip_a_bit(checkpoint / "moments.safetensors")


def flip_weights(checkpoint: Path, _: Path) -> None:
    flip_a_bit(checkpoint / "trained.safetensors")


def miss_all(checkpoint: Path, _: Path) -> None:
    shutil.rmtree(checkpoint)


def cut(checkpoint: Path, _: Path) -> None:
    path = checkpoint / "random.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def miss(checkpoint: Path, _: Path) -> None:
    (checkpoint / "trained.safetensors").unlink()


def miss_manifest(checkpoint: Path, _: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def foreign_manifest(checkpoint: Path, other: Path) -> None:
    shutil.copy(other / checkpoint.name / MANIFEST, checkpoint / MANIFEST)


def foreign(checkpoint: Path, other: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(other / checkpoint.name, checkpoint)


def of_another_step(checkpoint: Path, _: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("checkpoint-2"), checkpoint)


DAMAGES = {
    flip: "moments.safetensors: checksum mismatch",
    cut: "random.safetensors: checksum mismatch",
    miss: "trained.safetensors: cannot be read",
    miss_manifest: "manifest.json: cannot be read",
    foreign_manifest: "checkpoint-6: was saved with data_seed 7, this run has 42",
    foreign: "checkpoint-6: was saved with data_seed 7, this run has 42",
    of_another_step: "checkpoint-6: its manifest is that of step 2",
}
