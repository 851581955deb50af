"""Folders to the hub and from it, through the real `huggingface_hub` against a stand-in on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pemt.commands import COMMANDS
from pemt.storage.hub import HubError, check_hub, download, local_folder, upload
from tests.support.hub import COMMIT, Hub, hub_for_this_process

TENSORS = bytes(range(256)) * 40


class Recording(Hub):
    """Writes down what was asked of it; while it is broken, LFS objects cannot be had."""

    asked: list[str]
    broken: bool

    def do_GET(self) -> None:
        if self.command == "GET":
            Recording.asked.append(self.path)
        if Recording.broken and self.path.startswith("/store/"):
            return self.answer(403, {"error": "the store is away"})
        return super().do_GET()

    def do_PUT(self) -> None:
        Recording.asked.append(self.path)
        super().do_PUT()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The served repositories; this process speaks to them."""
    Recording.asked, Recording.broken = [], False
    with hub_for_this_process(tmp_path / "root", Recording) as root:
        yield root


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder as `pemt export` writes one."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "README.md").write_text("# Tiny\n")
    (folder / "adapter_config.json").write_text('{"peft_type": "PEMT"}')
    (folder / "adapter_model.safetensors").write_bytes(TENSORS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_tensors_travel_by_lfs_and_come_back(root: Path, export: Path, tmp_path: Path) -> None:
    assert f"/me/tiny/commit/{COMMIT}" in upload(export, "me/tiny", private=False, message="one")
    (put,) = [path for path in Recording.asked if path.startswith("/store/")]
    assert contents(root / "me" / "tiny") == contents(export)
    Recording.asked.clear()
    assert contents(download("me/tiny", tmp_path / "pulled")) == contents(export)
    assert put in Recording.asked, "the tensors were fetched from the store"
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("revision", ["main", COMMIT, None])
def test_a_revision_that_is_there(
    root: Path, export: Path, tmp_path: Path, revision: str | None
) -> None:
    upload(export, "me/tiny", private=False, message="one")
    assert contents(download("me/tiny", tmp_path / "pulled", revision=revision)) == contents(export)


def test_a_revision_that_is_not_there(root: Path, export: Path, tmp_path: Path) -> None:
    upload(export, "me/tiny", private=False, message="one")
    with pytest.raises(HubError, match=r"Revision Not Found for url: .*nope.*check name and rev"):
        COMMANDS["pull"](["me/tiny", str(tmp_path / "pulled"), "--revision", "nope"])
    with pytest.raises(HubError, match="Revision Not Found"):
        local_folder("me/tiny", files=("README.md",), revision="nope")
    assert [path.name for path in tmp_path.iterdir() if "pulled" in path.name] == []


def test_a_cut_pull_is_gone_on_with_by_the_same_command(
    root: Path, export: Path, tmp_path: Path
) -> None:
    upload(export, "me/tiny", private=False, message="one")
    pulled, resolve = tmp_path / "pulled", f"/me/tiny/resolve/{COMMIT}"
    Recording.broken = True
    with pytest.raises(HubError, match="me/tiny: cannot be fetched from the hub"):
        COMMANDS["pull"](["me/tiny", str(pulled)])
    assert not pulled.exists()
    assert f"{resolve}/README.md" in Recording.asked
    Recording.asked.clear()
    Recording.broken = False
    COMMANDS["pull"](["me/tiny", str(pulled)])
    assert contents(pulled) == contents(export)
    assert f"{resolve}/README.md" not in Recording.asked, "what was there was fetched again"
    with pytest.raises(HubError, match="pulled: is not empty; give a new folder"):
        COMMANDS["pull"](["me/tiny", str(pulled)])


def test_a_token_that_is_refused(
    root: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(export, "me/tiny", private=True, message="one")
    monkeypatch.setenv("HF_TOKEN", "worn-out")
    with pytest.raises(HubError, match=r"cannot be pushed .*401.*`hf auth login`") as refused:
        COMMANDS["push"]([str(export), "me/tiny"])
    assert "worn-out" not in str(refused.value)
    with pytest.raises(HubError, match=r"cannot be fetched .*401.*`hf auth login`"):
        COMMANDS["pull"](["me/tiny", str(tmp_path / "pulled")])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"Repository Not Found .*for a private one `hf auth login`"):
        download("me/tiny", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_what_is_loaded_from_the_hub_is_said_once(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hub that answers, if only that there is no such model, leaves the rest to whoever loads it."""
    (root / "me" / "said").mkdir(parents=True)
    (root / "me" / "said" / "config.json").write_text("{}")
    for name in ("me/said", "me/nowhere", "me/said", str(root), "no hub id"):
        check_hub(name, file="config.json")
    said = capsys.readouterr().err.splitlines()
    assert said == [f"pemt: loading me/{name} from the hub ..." for name in ("said", "nowhere")]
