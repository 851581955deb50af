"""A file of tensors of which each is read when it is asked for, and the file alone is sent to other ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from pemt.storage import (
    StorageError,
    TensorFile,
    open_tensors,
    read_manifest,
    tensor_file,
    write_folder,
)
from tests.support.damages import flip_a_bit

NAME = "trained.safetensors"
TENSORS = {"a.weight": torch.randn(300, 40), "b.bias": torch.randn(7)}


@pytest.fixture
def opened(tmp_path: Path) -> TensorFile:
    folder = write_folder(tmp_path / "checkpoint-1", {NAME: TENSORS}, {})
    return open_tensors(folder, NAME, read_manifest(folder))


def test_each_tensor_comes_out_of_the_file(opened: TensorFile) -> None:
    assert set(opened) == set(TENSORS)
    assert len(opened) == 2
    assert all(torch.equal(opened[name], TENSORS[name]) for name in opened)
    assert opened.shapes() == {"a.weight": (300, 40), "b.bias": (7,)}
    assert opened.get("c") is None


def test_what_is_sent_is_the_file_and_not_its_tensors(opened: TensorFile) -> None:
    sent = pickle.dumps(opened)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)["b.bias"], TENSORS["b.bias"])


def test_a_damaged_file_is_refused_before_any_tensor_is_read(opened: TensorFile) -> None:
    flip_a_bit(opened.path)
    with pytest.raises(StorageError, match=r"checksum mismatch"):
        open_tensors(opened.path.parent, NAME, read_manifest(opened.path.parent))


def test_another_table_of_contents_is_refused(opened: TensorFile) -> None:
    manifest = read_manifest(opened.path.parent)
    manifest["files"][NAME]["tensors"]["b.bias"]["shape"] = [8]
    with pytest.raises(StorageError, match="holds other tensors"):
        open_tensors(opened.path.parent, NAME, manifest)


def test_a_machine_that_does_not_see_it(
    opened: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened.wait_until_visible()
    monkeypatch.setattr(tensor_file, "VISIBLE_WITHIN_SECONDS", 0.0)
    opened.path.write_bytes(opened.path.read_bytes()[:-1])
    assert not opened.wait_until_visible()
    opened.path.unlink()
    assert not opened.wait_until_visible()
