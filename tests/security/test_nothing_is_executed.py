"""Nothing from a disk or the hub is executed, leads out of its folder, or is believed about its size."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import struct
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pemt.bank.entries import read_entry, write_entry
from pemt.bank.manifests import BankError, entry_folder
from pemt.bank.official import read_official
from pemt.bank.peft_format import read_peft
from pemt.config import ConfigError, PemtError
from pemt.config.parse import read_yaml_mapping
from pemt.model import base_shape
from pemt.storage.folders import recover_interrupted_replace
from pemt.storage.manifest import MANIFEST, read_manifest, sha256, with_checksum
from pemt.tasks import TaskError
from pemt.tasks.task_file import load_task_file
from tests.conftest import ROOT
from tests.support.evil import Evil
from tests.support.tiny_t5 import tiny_base, tiny_source

SOURCES = sorted((ROOT / "pemt").rglob("*.py"))
SHAPE = base_shape(tiny_base().config)


@cache
def every_call() -> list[tuple[str, Path, ast.Call]]:
    """Of pemt, with what is called as it is written."""
    return [
        (ast.unparse(node.func), path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Every call in pemt whose dotted name ends so."""
    return ((path, call) for called, path, call in every_call() if called.endswith(name))


def test_no_code_of_the_hub_is_trusted() -> None:
    assert len(list(calls("from_pretrained"))) > 3, "the search finds nothing"
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"trust_remote_code\s*=\s*(?!False\b)", text) == [], path


def test_pickles_are_loaded_as_weights_alone() -> None:
    found = list(calls("torch.load"))
    assert found, "the search finds nothing"
    for path, call in found:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", path
    for module in ("pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve"):
        assert not list(calls(f"{module}.load")), module
        assert not list(calls(f"{module}.loads")), module


def test_yaml_makes_plain_values_alone(tmp_path: Path) -> None:
    loads = [ast.unparse(call) for _, call in calls("yaml.load")]
    assert sorted(loads) == [
        "yaml.load(content, Loader=yaml.BaseLoader)",  # texts, lists and mappings alone
        "yaml.load(text, Loader=_UniqueKeyLoader)",
    ]
    assert not list(calls("yaml.unsafe_load"))
    assert not list(calls("yaml.full_load"))
    path = tmp_path / "evil.yaml"
    for tag in (
        "python/object/apply:os.mkdir",
        "python/name:os.system",
        "python/object/new:os.mkdir",
    ):
        path.write_text(f"name: !!{tag} [{tmp_path / 'made'}]\n")
        with pytest.raises(ConfigError, match="could not determine a constructor"):
            read_yaml_mapping(path)
        with pytest.raises(TaskError, match="could not determine a constructor"):
            load_task_file(path)
    assert not (tmp_path / "made").exists()


def test_nothing_is_evaluated() -> None:
    for name in ("eval", "exec", "os.system", "os.popen", "__import__"):
        found = [path for path, call in calls(name) if ast.unparse(call.func) == name]
        assert found == [], name
    for path, call in calls("subprocess.run"):
        assert all(keyword.arg != "shell" for keyword in call.keywords), path


def test_yaml_that_unfolds_into_billions(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines) + "\n")
    for read in (read_yaml_mapping, load_task_file):
        with pytest.raises(PemtError, match="unfolds into more than 100,000 values"):
            read(path)
    path.write_text("name: &a [*a]\n")
    with pytest.raises(PemtError, match="contains itself"):
        read_yaml_mapping(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", [os.mkdir, eval, os.system], ids=lambda call: call.__name__)
def test_a_malicious_pickle(tmp_path: Path, call: Any, legacy: bool) -> None:
    made = tmp_path / "made"
    argument = str(made) if call is os.mkdir else f"__import__('os').mkdir({str(made)!r})"
    if call is os.system:
        argument = f"mkdir {made}"
    good = {"lora.pt": {lora_key("A"): torch.ones(4, 48)}, "task_embedding.pt": torch.ones(2, 16)}
    for evil in good:
        for name, content in {**good, evil: {"evil": Evil(call, argument)}}.items():
            torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(BankError, match=f"{evil}: refused: it would call") as raised:
            read_official(tmp_path, name="x")
        assert "only plain tensors are taken" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not made.exists()


def lora_key(factor: str) -> str:
    return f"encoder.block.0.layer.1.DenseReluDense.wo.lora_{factor}"


def test_a_pickled_tensor_that_claims_more_than_its_file_holds(tmp_path: Path) -> None:
    """Stride 0: four bytes stand for 2^60 numbers, which a copy in another dtype would ask memory for."""
    huge = torch.ones(1, dtype=torch.float16).as_strided((2**30, 2**30), (0, 0))
    torch.save({lora_key("A"): huge, lora_key("B"): torch.ones(16, 4)}, tmp_path / "lora.pt")
    torch.save(torch.ones(2, 16), tmp_path / "task_embedding.pt")
    with pytest.raises(BankError, match=r"lora\.pt: .*claims more numbers than the file holds"):
        read_official(tmp_path, name="x")
    torch.save({lora_key("A"): torch.ones(4, 48)}, tmp_path / "lora.pt")
    torch.save(huge, tmp_path / "task_embedding.pt")
    with pytest.raises(BankError, match=r"task_embedding\.pt: .*claims more numbers"):
        read_official(tmp_path, name="x")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({lora_key("A"): torch.zeros(4, 48)}, tmp_path / "whole.pt")
    torch.save(torch.ones(2, 16), tmp_path / "task_embedding.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "lora.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in whole.infolist():
            data = whole.read(entry)
            bomb.writestr(entry.filename, bytes(1 << 28) if "data/0" in entry.filename else data)
    assert (tmp_path / "lora.pt").stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BankError, match=r"lora\.pt: would unpack to 268\d+ bytes"):
        read_official(tmp_path, name="x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


HEADERS: dict[str, tuple[int | None, Any]] = {
    "2^60 elements": (None, {"w": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}),
    "2^60 in 8 bytes": (None, {"w": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 8]}}),
    "an overflowing product": (
        None,
        {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
    ),
    "offsets before the file": (
        None,
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    ),
    "two tensors in one place": (
        None,
        {
            "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
    ),
    "a header of 2^63 bytes": (2**63 - 1, {}),
    "a header longer than the file": (10_000, {}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(tmp_path: Path, name: str) -> None:
    """In a bank under a fitting checksum, and where there is no manifest: PEFT's folders."""
    length, header = HEADERS[name]
    raw = json.dumps(header).encode()
    data = struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(8)
    entry = write_entry(
        tmp_path, tiny_source("rte"), base={"name": "t", **SHAPE}, description=None, metrics={}
    )
    path, manifest = entry / "expert.safetensors", read_manifest(entry)
    path.write_bytes(data)
    manifest["files"][path.name] |= {"bytes": len(data), "sha256": sha256(path)}
    (entry / MANIFEST).write_text(with_checksum(manifest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PemtError, match=r"expert\.safetensors: cannot be read"):
        read_entry(entry)
    adapter = tmp_path / "peft"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(data)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["wo"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BankError, match=r"adapter_model\.safetensors: cannot be read"):
        read_peft(adapter, SHAPE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    "name", ["../rte", "/etc", "a/b", "..", ".", "", "a\x00b", ".hidden", "a\\b"]
)
def test_no_entry_lies_outside_of_its_bank(tmp_path: Path, name: str) -> None:
    try:
        folder = entry_folder(tmp_path / "bank", name)
    except BankError:
        return
    assert folder.resolve().parent == (tmp_path / "bank").resolve()


def test_a_link_in_a_files_place_is_not_followed(tmp_path: Path) -> None:
    base = {"name": "t", **SHAPE}
    entry = write_entry(tmp_path, tiny_source("rte"), base=base, description=None, metrics={})
    for name in ("expert.safetensors", MANIFEST):
        elsewhere = (entry / name).rename(tmp_path / f"moved-{name}")
        (entry / name).symlink_to(elsewhere)
        with pytest.raises(PemtError, match="is a symbolic link, and only regular files are read"):
            read_entry(entry)
        (entry / name).unlink()
        elsewhere.rename(entry / name)
    read_entry(entry)


def test_what_a_crash_left_is_brought_back_into_its_folder_alone(tmp_path: Path) -> None:
    """The name of a left folder becomes a name in the same folder, whatever it is."""
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / ".writing-replaced-..").mkdir()
    recover_interrupted_replace(tmp_path / "bank")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


@pytest.mark.parametrize("legacy", [False, True])
def test_an_adapters_pickle_gives_plain_tensors_or_nothing(tmp_path: Path, legacy: bool) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["wo"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sparse, meta = torch.ones(4, 48).to_sparse(), torch.ones(1, device="meta")
    for saved, told in {
        "would run": ({"w": Evil(os.mkdir, str(tmp_path / "made"))}, "refused: it would call"),
        "sparse": ({"w": sparse}, "something else than a dict of plain tensors"),
        "nowhere": ({"w": meta}, "something else than a dict of plain tensors"),
        "whole numbers": ({"w": torch.ones(4, 48).int()}, "else than a dict of plain tensors"),
        "no tensor": ({"w": "text"}, "something else than a dict of plain tensors"),
        "no dict": ([torch.ones(2)], "something else than a dict of plain tensors"),
    }.values():
        path = tmp_path / "adapter_model.bin"
        torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(BankError, match=rf"adapter_model\.bin: .*{told}"):
            read_peft(tmp_path, SHAPE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BankError, match=r"adapter_model\.bin: "):
        read_peft(tmp_path, SHAPE)
    assert not (tmp_path / "made").exists()


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path) -> None:
    torch.save({"w": Evil(os.mkdir, str(tmp_path / "made"))}, tmp_path / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["wo"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BankError, match="found adapters on"):
        read_peft(tmp_path, SHAPE)
    assert not (tmp_path / "made").exists()
