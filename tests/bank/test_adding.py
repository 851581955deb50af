"""`pemt bank add`: adapters of the hub in one command, and from them to an adapted model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pemt.bank.adding import Adapter, add_peft
from pemt.bank.entries import read_entry
from pemt.bank.manifests import entry_names
from pemt.commands import COMMANDS
from pemt.config import MixtureConfig, PemtError
from pemt.run.train import run_adapt
from tests.support.adapters import LORAHUB, make_adapter
from tests.support.hub import hub_for_this_process
from tests.support.tiny import adapt_config, make_base, tiny_task, write_task_files

TARGET = "tiny-target"
NAMES = ["flan_t5_tiny-red_box", "flan_t5_tiny-white_lid", "flan_t5_tiny-wo"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two in LoraHub's form, one of them a pickle as there, and one on the FFNs."""
    folder = tmp_path_factory.mktemp("hub") / "someone"
    settings: list[dict[str, Any]] = [LORAHUB, {**LORAHUB, "pickled": True}, {"r": 2}]
    return [
        make_adapter(base, folder / name, **given)
        for name, given in zip(NAMES, settings, strict=True)
    ]


def test_from_hub_adapters_to_an_adapted_model(
    base: Path, adapters: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    (adapters[0] / "huge.bin").write_bytes(b"not wanted")

    def add(*names: str) -> None:
        ids = [f"someone/{name}" for name in names]
        COMMANDS["bank"](["add", "--peft", *ids, "--bank_dir", str(bank)])

    with hub_for_this_process(adapters[0].parents[1]):
        with pytest.raises(PemtError, match="someone/blue: is no folder here, and from"):
            add(NAMES[0], "blue")
        assert not bank.exists(), "all or none"
        add(*NAMES)
    out, errors = capfd.readouterr()
    told = out.splitlines()
    assert [line.split(": lora on ")[1].split(", on ")[0] for line in told] == [
        "q, v, rank 16", "q, v, rank 16", "wo, rank 2",
    ]  # fmt: skip
    assert told[0].endswith("prompt: made from `flan t5 tiny red box`")
    assert entry_names(bank) == NAMES
    assert "%|" not in errors, "bars in a file"

    tiny_task(TARGET)
    data = write_task_files(tmp_path / "data", seed=0)
    results = run_adapt(
        adapt_config(
            *(base, data, tmp_path / "run", bank, TARGET),
            source_tasks=["flan_t5_tiny-*"],
            mixture=MixtureConfig(top_sources=2),
            max_steps=2,
            eval_strategy="no",
        )
    )
    assert len(results["sources"]) == 2
    assert set(results["sources"]) < set(NAMES)


def test_names_and_sentences_one_for_each(
    base: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "bank"
    both = ["--peft", str(adapters[0]), str(adapters[1]), "--bank_dir", str(bank)]
    COMMANDS["bank"](["add", *both, "--task", "red", "mnli", "--description", "is it red", "is it"])
    assert [read_entry(bank / name)[0].description for name in ("red", "mnli")] == [
        "is it red", "is it",
    ]  # fmt: skip
    for words, told in (
        (["--task", "a"], "--task: found 1 for 2 adapters; give one for each, or none"),
        (["--description", "a"], "--description: found 1 for 2 adapters"),
        (["--task", "a", "a"], "`a` is the name of two entries"),
    ):
        with pytest.raises(PemtError, match=told):
            COMMANDS["bank"](["add", *both, *words])
    assert entry_names(bank) == ["mnli", "red"]


def test_one_bank_is_for_one_base(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    other = make_adapter(base, tmp_path / "other", r=2)
    config = other / "adapter_config.json"
    content = {**json.loads(config.read_text()), "base_model_name_or_path": "t5-elsewhere"}
    config.write_text(json.dumps(content))
    wanted = [Adapter(str(adapters[0])), Adapter(str(other))]
    with pytest.raises(PemtError, match=r"other: is for the base model t5-elsewhere, and "):
        add_peft(wanted, bank_dir=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    added = add_peft(wanted, bank_dir=tmp_path / "bank", model_name_or_path=str(base))
    assert [each.folder.name for each in added] == [NAMES[0], "other"]


def test_one_that_cannot_be_stored_keeps_the_others_out(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapters[2], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(PemtError, match=r"broken: not written: .* has infinite or NaN values"):
        add_peft([Adapter(str(adapters[0])), Adapter(str(broken))], bank_dir=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
