"""A whole bank to the hub and from it, through the real `huggingface_hub` against a stand-in on this machine.

The experts are LoRAs that the real `peft` has written in LoraHub's form: rank 16, alpha 32, on q and v.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pemt.bank import manifests_in
from pemt.bank.adding import Adapter, add_peft
from pemt.bank.entries import read_entry, write_entry
from pemt.bank.manifests import entry_names
from pemt.bank.tools import verify
from pemt.commands import COMMANDS
from pemt.config import PemtError
from pemt.model import base_shape
from pemt.publish import bank_transfer
from pemt.publish.bank_card import bank_card
from pemt.storage import HubError
from pemt.storage.manifest import read_manifest, with_checksum
from tests.support.adapters import LORAHUB, make_adapter
from tests.support.hub import COMMIT, Hub, hub_for_this_process
from tests.support.tiny import make_base
from tests.support.tiny_t5 import tiny_base, tiny_source

ADAPTERS = {"flan_t5_tiny-red_box": False, "flan_t5_tiny-white_lid": True}  # pickled or not
NAMES = list(ADAPTERS)
REPOSITORY = "me/bank"


class Recording(Hub):
    """Writes down what was asked of it; while it is broken, experts cannot be had."""

    asked: list[str]
    broken: bool

    def do_GET(self) -> None:
        Recording.asked.append(self.path)
        if Recording.broken and self.path.startswith("/store/"):
            return self.answer(403, {"error": "the store is away"})
        return super().do_GET()

    def do_POST(self) -> None:
        Recording.asked.append(self.path)
        super().do_POST()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, adapters below `root/someone`, and `bank` with the first two of them."""
    made = tmp_path_factory.mktemp("made")
    base = make_base(made / "base", feed_forward_proj="gated-gelu")
    for seed, (name, pickled) in enumerate(ADAPTERS.items()):
        make_adapter(base, made / "root" / "someone" / name, pickled=pickled, seed=seed, **LORAHUB)
    card = made / "root" / "someone" / NAMES[0] / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n# Red boxes\n")
    (made / "root" / "someone" / NAMES[1] / "README.md").write_text("---\nlicense: [\n---\n")
    make_adapter(base, made / "other" / NAMES[0], seed=9, **LORAHUB)
    with hub_for_this_process(made / "root"):
        add_peft([Adapter(f"someone/{name}") for name in NAMES], bank_dir=made / "bank")
    return made


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The served repositories; `tmp_path/bank` is a bank of this test's own."""
    shutil.copytree(made / "bank", tmp_path / "bank")
    Recording.asked, Recording.broken = [], False
    with hub_for_this_process(tmp_path / "root", Recording) as root:
        yield root


def push(tmp_path: Path, *options: str) -> None:
    bank = str(tmp_path / "bank")
    COMMANDS["bank"](["push", REPOSITORY, "--bank_dir", bank, *options])


def pull(bank: Path, *options: str, repository: str = REPOSITORY) -> None:
    COMMANDS["bank"](["pull", repository, "--bank_dir", str(bank), *options])


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def replace_with_another(made: Path, bank: Path) -> None:
    """The first entry is made of another adapter of the same name."""
    other = Adapter(str(made / "other" / NAMES[0]))
    add_peft([other], bank_dir=bank, overwrite=True)


def commits() -> int:
    return sum("/commit/" in path for path in Recording.asked)


def test_there_and_back(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(tmp_path, "--private")
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == f"me/bank: added {', '.join(NAMES)}"
    assert f"/me/bank/commit/{COMMIT}" in told.out
    assert "base, a folder of this machine; others need its name" in told.err
    assert commits() == 1
    pushed = contents(root / "me" / "bank")
    bank = contents(tmp_path / "bank")
    assert pushed.keys() == bank.keys() | {"README.md"}
    assert len(bank) == 4
    pull(tmp_path / "pulled")
    assert capsys.readouterr().out == f"{tmp_path / 'pulled'}: added {', '.join(NAMES)}\n"
    assert contents(tmp_path / "pulled") == bank, "as they were, and nothing beside them"
    assert verify(tmp_path / "pulled") == dict.fromkeys(NAMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="Repository Not Found"):
            pull(tmp_path / "public")
    assert not (tmp_path / "public").exists()


def test_the_card_has_a_row_an_expert(root: Path, tmp_path: Path) -> None:
    source = tiny_source("own", seed=3)  # of another base: taken for the row alone
    push(tmp_path, "--base_model", "google/flan-t5-large", "--license", "mit")
    card = ModelCard((root / "me" / "bank" / "README.md").read_text())
    assert card.data.base_model == "google/flan-t5-large"
    assert card.data.library_name == "pemt"
    assert card.data.license is None, "one of the two is not known"
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    origin = f"someone/{{}}@{COMMIT}"
    assert rows[2:] == [
        f"| {NAMES[0]} | q, v | lora | 16 | google/flan-t5-large | {origin.format(NAMES[0])} | apache-2.0 | none |",
        f"| {NAMES[1]} | q, v | lora | 16 | google/flan-t5-large | {origin.format(NAMES[1])} | not known | none |",
    ]
    base = {"name": "x", **base_shape(tiny_base().config)}
    write_entry(
        tmp_path / "two",
        source,
        base=base,
        description=None,
        metrics={"accuracy": 91.25, "average_metrics": 91.25},
    )
    write_entry(
        tmp_path / "two",
        tiny_source("strange"),
        base=base,
        description=None,
        metrics={},
        origin="x/y@z",
        licence="a | b\n\n# <b>c",
    )
    text = bank_card(manifests_in(tmp_path / "two"), "me/two", base_model="x", licence="mit")
    row, strange = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert (
        row
        == "| own | wo | lora | 4 | x | trained or given by the publisher | mit | accuracy 91.2 |"
    )
    assert "| a \\| b # \\<b\\>c | none |" in strange


def test_what_is_there_already_is_neither_sent_nor_fetched(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(tmp_path)
    capsys.readouterr()
    push(tmp_path)
    assert capsys.readouterr().out == (
        f"me/bank: there already: {', '.join(NAMES)}\nnothing to push\n"
    )
    assert commits() == 1
    shutil.rmtree(tmp_path / "bank" / NAMES[1])
    manifest = tmp_path / "bank" / NAMES[0] / "manifest.json"
    before = manifest.read_bytes()
    Recording.asked.clear()
    pull(tmp_path / "bank")
    assert capsys.readouterr().out == (
        f"{tmp_path / 'bank'}: added {NAMES[1]}; there already: {NAMES[0]}\n"
    )
    assert manifest.read_bytes() == before
    fetched = {path for path in Recording.asked if path.endswith("expert.safetensors")}
    assert fetched == {f"/me/bank/resolve/{COMMIT}/{NAMES[1]}/expert.safetensors"}


def test_another_of_the_same_name_is_replaced_when_that_is_asked_for(
    made: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(tmp_path)
    pushed = contents(root / "me" / "bank")
    bank = tmp_path / "bank"
    replace_with_another(made, bank)
    shutil.rmtree(bank / NAMES[1])
    mine = contents(bank)
    for act, where in ((push, "me/bank"), (lambda _: pull(bank), str(bank))):
        with pytest.raises(
            PemtError, match=rf"{where}: has 1 other entry of the same name: {NAMES[0]}; nothing"
        ):
            act(tmp_path)
    assert contents(root / "me" / "bank") == pushed
    assert contents(bank) == mine
    assert commits() == 1
    shutil.copytree(bank, tmp_path / "kept")
    capsys.readouterr()
    pull(bank, "--overwrite")
    assert capsys.readouterr().out == f"{bank}: added {NAMES[1]}; replaced {NAMES[0]}\n"
    assert contents(bank) == contents(made / "bank")
    shutil.rmtree(bank)
    shutil.copytree(tmp_path / "kept", bank)
    push(tmp_path, "--overwrite")
    assert f"me/bank: replaced {NAMES[0]}\n" in capsys.readouterr().out
    there = contents(root / "me" / "bank")
    assert {name: there[name] for name in mine} == mine
    assert there[f"{NAMES[1]}/manifest.json"] == pushed[f"{NAMES[1]}/manifest.json"]
    assert all(name in there["README.md"].decode() for name in NAMES), "its other entry has a row"


def test_a_damaged_expert_leaves_the_bank_as_it_was(root: Path, tmp_path: Path) -> None:
    push(tmp_path)
    path = root / "me" / "bank" / NAMES[1] / "expert.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x7f")
    with pytest.raises(
        PemtError,
        match=rf"me/bank: 1 entry cannot be used \({NAMES[1]}\); nothing was ch.*mismatch",
    ):
        pull(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    shutil.copy(path, tmp_path / "bank" / NAMES[1])
    with pytest.raises(PemtError, match="bank: 1 entry cannot be used"):
        push(tmp_path)
    assert commits() == 1


def test_a_cut_pull_is_gone_on_with_by_the_same_command(root: Path, tmp_path: Path) -> None:
    push(tmp_path)
    Recording.broken = True
    with pytest.raises(HubError, match="me/bank: cannot be fetched from the hub"):
        pull(tmp_path / "new")
    with pytest.raises(PemtError, match="has no entry"):
        entry_names(tmp_path / "new")
    Recording.broken = False
    Recording.asked.clear()
    pull(tmp_path / "new")
    assert contents(tmp_path / "new") == contents(tmp_path / "bank")
    assert not any(path.endswith("manifest.json") for path in Recording.asked), "fetched again"


def test_a_repository_that_was_changed_meanwhile_is_left_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_transfer, "make_repository", lambda *_, **__: "b" * 40)
    monkeypatch.setattr(bank_transfer, "fetch_files", lambda *_, **__: None)
    (root / "me" / "bank").mkdir(parents=True)
    with pytest.raises(HubError, match=r"me/bank: cannot be pushed to the hub .*412"):
        push(tmp_path)
    assert contents(root / "me" / "bank") == {}


def test_what_is_no_bank_or_another_bases(made: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "root" / "someone", root / "someone")
    with pytest.raises(PemtError, match=r"holds no expert bank .*`pemt bank add --peft`"):
        pull(tmp_path / "new", repository=f"someone/{NAMES[0]}")
    with pytest.raises(HubError, match="Revision Not Found"):
        pull(tmp_path / "new", "--revision", "nope", repository=f"someone/{NAMES[0]}")
    assert not (tmp_path / "new").exists()
    push(tmp_path)
    elsewhere = make_base(tmp_path / "elsewhere", d_model=8, feed_forward_proj="gated-gelu")
    adapter = make_adapter(elsewhere, tmp_path / "wide", **LORAHUB)
    add_peft([Adapter(str(adapter))], bank_dir=tmp_path / "new")
    before = contents(tmp_path / "new")
    with pytest.raises(PemtError, match="a bank is for one base model"):
        pull(tmp_path / "new")
    assert contents(tmp_path / "new") == before


def test_entries_that_know_neither_origin_nor_licence_are_read(made: Path, tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    entry = tmp_path / NAMES[0]
    shutil.copytree(made / "bank" / NAMES[0], entry)
    assert read_entry(entry)[0].licence == "apache-2.0"
    raw = read_manifest(entry)
    old = {key: value for key, value in raw.items() if key not in ("origin", "licence")}
    (entry / "manifest.json").write_text(with_checksum(old))
    manifest, _ = read_entry(entry)
    assert (manifest.origin, manifest.licence) == (None, None)
    (entry / "manifest.json").write_text(with_checksum({**old, "licence": [1]}))
    with pytest.raises(PemtError, match="licence: found"):
        read_entry(entry)
