"""A file of tensors of which each is read when it is asked for, and the file alone is sent to other ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from pemt.storage import (
    TensorFile,
    open_tensors,
    read_manifest,
    tensor_file,
    write_folder,
)

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
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in opened.load().items())
    assert opened.load().keys() == TENSORS.keys()


def test_what_is_sent_is_the_file_and_not_its_tensors(opened: TensorFile) -> None:
    sent = pickle.dumps(opened)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)["b.bias"], TENSORS["b.bias"])


def test_a_machine_that_does_not_see_it(
    opened: TensorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened.wait_until_visible()
    monkeypatch.setattr(tensor_file, "VISIBLE_WITHIN_SECONDS", 0.0)
    opened.path.write_bytes(opened.path.read_bytes()[:-1])
    assert not opened.wait_until_visible()
    opened.path.unlink()
    assert not opened.wait_until_visible()
