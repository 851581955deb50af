"""The bank gives back what was put in, and refuses what it should not mix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pemt.bank.entries import read_bank, read_entry, write_entry
from pemt.bank.manifests import TENSORS, BankError, Manifest, chosen_entries, entry_names
from pemt.config import PemtError
from pemt.model import ExpertSource, ModelError, base_shape
from pemt.storage import tensor_file, write_folder
from pemt.storage.manifest import read_manifest, with_checksum
from tests.support.damages import flip_a_bit
from tests.support.tiny_t5 import source_model, target_model, tiny_base, tiny_batch, tiny_source

NAME = "google/tiny-t5"
SHAPE = base_shape(tiny_base().config)
BASE = {"name": NAME, **SHAPE}


def put(bank: Path, source: ExpertSource, **changes: Any) -> Path:
    arguments = {
        "base": BASE,
        "description": "Does one sentence follow?",
        "metrics": {"accuracy": 71.5},
        **changes,
    }
    return write_entry(bank, source, **arguments)


def read(bank: Path, **changes: Any) -> list[ExpertSource]:
    return read_bank(bank, **{"base_shape": SHAPE, "base_name": NAME, **changes})


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Entries boolq, mnli and rte."""
    for seed, name in enumerate(("rte", "boolq", "mnli")):
        put(tmp_path / "bank", tiny_source(name, prompt=3 + seed, seed=seed))
    return tmp_path / "bank"


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_entry_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    source = tiny_source("superglue-cb", kind)
    folder = put(tmp_path / "bank", source)
    assert folder == tmp_path / "bank" / "superglue-cb"
    assert sorted(path.name for path in folder.iterdir()) == ["expert.safetensors", "manifest.json"]
    manifest, found = read_entry(folder)
    assert (found.name, found.kind, found.rank, found.alpha) == ("superglue-cb", kind, 4, 8.0)
    assert found.weights.keys() == source.weights.keys()
    for key, tensor in source.weights.items():
        assert torch.equal(found.weights[key], tensor)
    assert torch.equal(found.prompt_PD, source.prompt_PD)
    assert isinstance(manifest, Manifest)
    assert manifest.base == BASE
    assert manifest.metrics == {"accuracy": 71.5}
    assert manifest.description == "Does one sentence follow?"
    assert manifest.versions["torch"] == version("torch")


def test_an_entry_is_not_opened_for_each_tensor(
    bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each maps the file, and Linux allows a process 65,530 maps: by tensor, a large bank would not fit."""
    openings = []

    def opening(*arguments: object) -> object:
        openings.append(arguments)
        return safe_open(*arguments)

    monkeypatch.setattr(tensor_file, "safe_open", opening)
    read_entry(bank / "rte")
    assert len(openings) == 2, "its table of contents, and all tensors"


def test_from_stage_one_to_stage_two(tmp_path: Path) -> None:
    """The base's weights decide whether it is the same model, not its name."""
    put(tmp_path, source_model().export_expert("rte"))
    (source,) = read(tmp_path, base_name="a-copy/of-it")
    out = target_model([source])(**tiny_batch())
    assert out.gates_BLK.shape[-1] == 1
    assert target_model([source], base=tiny_base().bfloat16()).base_sha256 == source.base_sha256
    with pytest.raises(ModelError, match="source `rte`: trained on a base model with other weigh"):
        target_model([source], base=tiny_base(seed=1))


def test_stored_in_bfloat16(tmp_path: Path) -> None:
    """As Python could once write it, and merged banks may hold it."""
    source = tiny_source()
    folder = put(tmp_path, source)
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(folder / TENSORS).items()}
    write_folder(folder, {TENSORS: tensors}, {**read_manifest(folder), "dtype": "bfloat16"})
    manifest, found = read_entry(folder)
    assert manifest.dtype == "bfloat16"
    assert torch.equal(found.prompt_PD, source.prompt_PD.bfloat16())


def test_an_entry_is_replaced_whole(bank: Path) -> None:
    newer = tiny_source("rte", seed=99)
    put(bank, newer)
    assert torch.equal(read(bank, tasks=["rte"])[0].prompt_PD, newer.prompt_PD)
    assert sorted(path.name for path in bank.iterdir()) == ["boolq", "mnli", "rte"]


def test_a_failed_write_leaves_the_older_entry(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(bank, tasks=["rte"])[0].prompt_PD

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pemt.storage.folders.save_tensors", full)
    with pytest.raises(PemtError, match="No space left on device"):
        put(bank, tiny_source("rte", seed=99))
    monkeypatch.undo()
    assert torch.equal(read(bank, tasks=["rte"])[0].prompt_PD, before)
    assert entry_names(bank) == ["boolq", "mnli", "rte"]


def test_order_and_choice_of_entries(bank: Path) -> None:
    assert [source.name for source in read(bank)] == ["boolq", "mnli", "rte"]
    assert [source.name for source in read(bank, tasks=["rte", "boolq"])] == ["rte", "boolq"]
    assert [len(source.prompt_PD) for source in read(bank)] == [4, 5, 3]


def test_other_folders_are_no_entries(bank: Path) -> None:
    (bank / "notes").mkdir()
    shutil.copytree(bank / "rte", bank / ".writing-rte-1")
    assert entry_names(bank) == ["boolq", "mnli", "rte"]


def test_a_copy_of_the_base_model_on_disk_is_the_same_model(bank: Path) -> None:
    assert len(read(bank, base_name="models/tiny-t5/")) == 3


@pytest.mark.parametrize("name", ["../rte", "a/b", "/etc", "..", ".", "", ".hidden", "a\nb", "-x"])
def test_a_name_that_is_no_folder_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(BankError, match="no name for a folder"):
        put(tmp_path / "bank", tiny_source(name))
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_a_diverged_expert_is_not_stored(tmp_path: Path, value: float) -> None:
    weights = {key: tensor.double() for key, tensor in tiny_source().weights.items()}
    weights["decoder.0.up"][0, 0] = value
    with pytest.raises(BankError, match=r"`decoder.0.up` has infinite or NaN values"):
        put(tmp_path / "bank", replace(tiny_source(), weights=weights))
    assert not (tmp_path / "bank").exists()


def test_an_expert_of_another_shape_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this base model and rank 4 need"):
        put(tmp_path / "bank", tiny_source(), base={**BASE, "d_ff": 64})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["rt"]}, "source_tasks: `rt` is not in BANK; nearest: rte"),
        ({"tasks": ["zzz"]}, "`zzz` is not in BANK; it has: boolq, mnli, rte"),
        ({"tasks": ["../rte"]}, "source_tasks: `../rte` is not in BANK"),
        ({"tasks": []}, "source_tasks: found []; name at least one entry, each once"),
        ({"tasks": ["rte", "rte"]}, "source_tasks: found ['rte', 'rte']; name at least one"),
        (
            {"base_shape": {**SHAPE, "d_model": 32}},
            "BANK/boolq/manifest.json: made for a base model with d_model 16, google/tiny-t5 has",
        ),
        (
            {"base_shape": {**SHAPE, "feed_forward_proj": "gated-gelu"}},
            "made for a base model with feed_forward_proj relu, google/tiny-t5 has gated-gelu",
        ),
        (
            {"base_name": "google/other-t5"},
            "made for the base model google/tiny-t5, model_name_or_path is google/other-t5",
        ),
    ],
)
def test_what_cannot_be_mixed(bank: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(BankError) as raised:
        read(bank, **changes)
    assert expected.replace("BANK", str(bank)) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_bank_or_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"bank_dir: .*nothing is no folder; fill it with"):
        read(tmp_path / "nothing")
    with pytest.raises(BankError, match="has no entry; fill it with `pemt source`"):
        read(tmp_path)


def _cut(entry: Path) -> None:
    path = entry / "expert.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _drop_the_rank(entry: Path) -> None:
    path = entry / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["rank"], manifest["sha256"]
    path.write_text(with_checksum(manifest))


def _change(**changes: Any) -> Callable[[Path], None]:
    def apply(entry: Path) -> None:
        path = entry / "manifest.json"
        manifest = {**json.loads(path.read_text()), **changes}
        del manifest["sha256"]
        path.write_text(with_checksum(manifest))

    return apply


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda entry: flip_a_bit(entry / "expert.safetensors"), "expert.safetensors: "),
        (_cut, "expert.safetensors: "),
        (lambda entry: (entry / "expert.safetensors").unlink(), "expert.safetensors: "),
        (lambda entry: (entry / "manifest.json").write_text('{"task": '), "malformed JSON"),
        (lambda entry: (entry / "manifest.json").write_text("[]"), "manifest.json: "),
        (lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: "),
        (_drop_the_rank, "manifest.json: lacks `rank`"),
        (_change(rank=0), "rank: found 0, allowed is a whole number above 0"),
        (_change(rank=True), "rank: found True, allowed is a whole number above 0"),
        (_change(rank=7), "tensor `encoder.0.down` is [4, 48]"),
        (_change(alpha="64"), "alpha: found '64', allowed is a number above 0"),
        (_change(kind="prefix"), "kind: found 'prefix', allowed is lora or bottleneck"),
        (_change(kind="bottleneck"), "tensor `decoder.0.down` does not belong there"),
        (_change(format=2), "format: found 2, allowed is 1"),
        (_change(task="../mnli"), "task: found '../mnli', allowed is `rte`"),
        (_change(base="tiny"), "base: found 'tiny', allowed is an object"),
        (_change(files={}), "manifest.json: "),
    ],
)
def test_a_damaged_entry(bank: Path, damage: Callable[[Path], None], expected: str) -> None:
    damage(bank / "rte")
    with pytest.raises(PemtError) as raised:
        read(bank)
    assert expected in str(raised.value)
    assert str(bank / "rte") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(read(bank, tasks=["boolq", "mnli"])) == 2, "other entries are still good"


def test_entries_by_pattern(bank: Path) -> None:
    assert chosen_entries(bank, ["*t*", "boolq"]) == ["rte", "boolq"]
    assert chosen_entries(bank, ["rte", "*"]) == ["rte", "boolq", "mnli"]
    with pytest.raises(PemtError, match=r"source_tasks: `glue-\*` is not in"):
        chosen_entries(bank, ["glue-*"])
