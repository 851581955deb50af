"""Import of what the published code saves, and refusal of pickles that would run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pemt.bank.entries import import_official, read_bank
from pemt.bank.manifests import BankError
from pemt.config import PemtError
from pemt.model import ModelError, base_shape
from tests.parity.golden import Golden, golden_base
from tests.support.tiny_t5 import tiny_base, tiny_source

SHAPE = base_shape(tiny_base().config)
BASE = {"name": "t5-tiny", **SHAPE}
PROMPT_PD = tiny_source().prompt_PD


def published(kind: str) -> dict[str, Tensor]:
    """`tiny_source`'s tensors under the names of `lora.pt` or `adapter.pt`."""
    renamed = {}
    for key, tensor in tiny_source(kind=kind).weights.items():
        stack, layer, part = key.split(".", maxsplit=2)
        place = f"{stack}.block.{layer}.layer.{1 if stack == 'encoder' else 2}.DenseReluDense"
        if kind == "lora":
            renamed[f"{place}.wo.lora_{'A' if part == 'down' else 'B'}"] = tensor
        else:
            side, _, field = part.partition(".")
            adapter = f"{place}.adapter_controller.adapters.mnli"
            renamed[f"{adapter}.{side}_sampler.{field}"] = tensor
    return renamed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source task as the published code leaves it, with a LoRA expert."""
    path = tmp_path / "official"
    path.mkdir()
    torch.save(published("lora"), path / "lora.pt")
    torch.save(nn.Parameter(PROMPT_PD), path / "task_embedding.pt")
    return path


def run_import(folder: Path, **changes: Any) -> Path:
    arguments = {"bank_dir": folder.parent / "bank", "task": "mnli", "base": BASE, **changes}
    return import_official(folder, **arguments)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_import(folder: Path, kind: str) -> None:
    torch.save(published("bottleneck"), folder / "adapter.pt")
    entry = run_import(folder, kind=kind, alpha=8.0)
    assert entry == folder.parent / "bank" / "mnli"
    (found,) = read_bank(folder.parent / "bank", base_shape=SHAPE, base_name="t5-tiny")
    expected = tiny_source(kind=kind)
    assert (found.kind, found.rank, found.alpha) == (kind, 4, 8.0)
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[key], expected.weights[key]) for key in expected.weights)
    assert torch.equal(found.prompt_PD, PROMPT_PD)


@pytest.mark.parametrize(
    "saved",
    [
        lambda prompt_PD: prompt_PD,
        lambda prompt_PD: {"task_shared": nn.Parameter(prompt_PD)},
        lambda prompt_PD: {"task_shared": prompt_PD, "epoch": 3},
    ],
    ids=["tensor", "dict", "dict with more"],
)
def test_forms_of_the_prompt(folder: Path, saved: Any) -> None:
    torch.save(saved(PROMPT_PD), folder / "task_embedding.pt")
    run_import(folder)
    (found,) = read_bank(folder.parent / "bank", base_shape=SHAPE, base_name="t5-tiny")
    assert torch.equal(found.prompt_PD, PROMPT_PD)


@pytest.mark.real
def test_import_of_the_golden_sources(shared: Path, tmp_path: Path) -> None:
    """Through files and bank, the sources are those that stage 2 was published with."""
    golden = Golden.read(shared / "golden" / "pemt_tiny.safetensors")
    base = golden_base(golden.config, golden.under("stage2.param."))
    shape = base_shape(base.config)
    for k in range(golden.config["experts"]):
        folder = tmp_path / f"official{k}"
        folder.mkdir()
        torch.save(golden.under(f"source{k}.lora."), folder / "lora.pt")
        torch.save(golden.tensors[f"source{k}.task_shared"], folder / "task_embedding.pt")
        run_import(folder, task=f"source{k}", base={"name": "tiny", **shape})
    sources = read_bank(tmp_path / "bank", base_shape=shape, base_name="tiny")
    for k, source in enumerate(sources):
        assert source.rank == golden.config["lora_rank"]
        assert torch.equal(source.prompt_PD, golden.tensors[f"stage2.param.task_list.{k}"])
        for stack, layer in (("encoder", 1), ("decoder", 2)):
            wo = golden.under(f"stage2.param.{stack}.block.1.layer.{layer}.DenseReluDense.wo.")
            assert torch.equal(source.weights[f"{stack}.1.down"], wo[f"lora_A.{k}"])
            assert torch.equal(source.weights[f"{stack}.1.up"], wo[f"lora_B.{k}"])


def _renamed(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): value for key, value in published("lora").items()}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (_renamed("DenseReluDense.wo", "SelfAttention.q"), "is no part of a lora expert"),
        ({**published("lora"), "epoch": 3}, "`epoch` is no part of a lora expert"),
        ([1, 2], "found a list, needed is a dict of tensors"),
        ({}, "has no expert for the first encoder layer's FFN"),
        (nn.Linear(2, 2), "refused: it would call torch.nn.modules.linear.Linear"),
    ],
)
def test_a_file_of_something_else(folder: Path, saved: Any, expected: str) -> None:
    torch.save(saved, folder / "lora.pt")
    with pytest.raises(BankError) as raised:
        run_import(folder)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"no file of tensors", b"PK\x03\x04 cut"])
def test_a_broken_file(folder: Path, data: bytes) -> None:
    (folder / "lora.pt").write_bytes(data)
    with pytest.raises(BankError) as raised:
        run_import(folder)
    assert str(folder / "lora.pt") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_entry_is_replaced_only_when_that_is_said(folder: Path) -> None:
    run_import(folder)
    with pytest.raises(BankError, match="there is an entry of that name"):
        run_import(folder)
    run_import(folder, overwrite=True)


def test_which_file(folder: Path, tmp_path: Path) -> None:
    torch.save(published("bottleneck"), folder / "adapter.pt")
    with pytest.raises(BankError, match=r"holds both lora.pt and adapter.pt; choose"):
        run_import(folder)
    (folder / "lora.pt").unlink()
    with pytest.raises(BankError, match="holds no expert of kind lora"):
        run_import(folder, kind="lora")
    (folder / "task_embedding.pt").unlink()
    with pytest.raises(BankError, match=r"task_embedding.pt: does not exist"):
        run_import(folder)
    with pytest.raises(BankError, match=r"holds no expert; needed is lora.pt or adapter.pt"):
        run_import(tmp_path)


def test_two_prompts_or_none(folder: Path) -> None:
    for saved in ({"a": PROMPT_PD, "b": PROMPT_PD}, {}, torch.ones(3)):
        torch.save(saved, folder / "task_embedding.pt")
        with pytest.raises(BankError, match="needed is one prompt"):
            run_import(folder)


def test_what_fits_no_base_is_not_stored(folder: Path) -> None:
    with pytest.raises(ModelError, match="this base model and rank 4 need"):
        run_import(folder, base={**BASE, "d_ff": 64})
    with pytest.raises(BankError, match="no name for a folder"):
        run_import(folder, task="../mnli")
    weights = published("lora")
    weights.popitem()
    torch.save(weights, folder / "lora.pt")
    with pytest.raises(PemtError, match=r"tensor `decoder.2.(down|up)` is missing; needed are all"):
        run_import(folder)
    weights.popitem()
    torch.save(weights, folder / "lora.pt")
    with pytest.raises(PemtError, match=r"expert of decoder\.2's FFN is missing; needed is one"):
        run_import(folder)
    assert not (folder.parent / "bank").exists()
