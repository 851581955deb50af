"""Base and data that are folders, read from copies on the node's own disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pemt.config import AdaptConfig
from pemt.engine import Interrupted
from pemt.run import train
from pemt.run.staging import LOCK, StagingError, copy_of
from pemt.run.train import run_adapt
from tests.support.jobs import World, logged, results
from tests.support.stopped import Stops


def config_of(world: World, run: Path, **fields: object) -> AdaptConfig:
    few: dict[str, object] = {"max_steps": 4, "eval_strategy": "no", "save_steps": 2}
    return world.config(run, **{**few, **fields})


def copies(place: Path) -> list[str]:
    return sorted(path.name[:-13] for path in place.glob("pemt-*-*"))


def test_a_run_reads_the_copies_and_keeps_its_own_paths(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Begun without, resumed with; then the folders are not looked at any more."""
    whole = config_of(world, tmp_path / "whole")
    run_adapt(whole)
    config, place = config_of(world, tmp_path / "run"), tmp_path / "scratch"
    with pytest.raises(Interrupted):
        run_adapt(config, callbacks=[Stops])
    assert "is copied to" not in capsys.readouterr().out
    monkeypatch.setenv("PEMT_STAGE_DIR", str(place))
    read: list[str] = []

    def noted(name: str, tokenizer_name: str | None, **given: object) -> object:
        read.append(name)
        return load_pretrained(name, tokenizer_name, **given)

    load_pretrained = train.load_pretrained
    monkeypatch.setattr(train, "load_pretrained", noted)
    run_adapt(config)
    out = capsys.readouterr().out
    assert out.count(" is copied to ") == 2
    assert "resuming from step 2/4" in out
    assert copies(place) == ["pemt-base", "pemt-data"]
    assert [Path(name).parent for name in read] == [place]
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert results(tmp_path / "run")["test_loss"] == results(tmp_path / "whole")["test_loss"]
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert f"model_name_or_path: {world.folder / 'base'}\n" in text
    assert f"data_dir: {world.folder / 'data'}\n" in text


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"):
        (folder / name).write_text(name)
    (tmp_path / "blob").write_text("a hub's file")
    (folder / "spiece.model").symlink_to(tmp_path / "blob")
    return folder


def test_a_copy_is_made_once_and_again_when_a_file_changes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "scratch"
    first = copy_of(base, place)
    assert copy_of(base, place) == first
    assert capsys.readouterr().out.count("is copied to") == 1
    (base / "config.json").write_text("another")
    second = copy_of(base, place)
    assert second != first
    assert (second / "config.json").read_text() == "another"
    assert (first / "config.json").read_text() == "config.json", "another job may read it"
    assert copy_of(first, place) == first, "it is there already"


def test_what_is_never_read_is_left_out(base: Path, tmp_path: Path) -> None:
    copy = copy_of(base, tmp_path / "scratch", unread=("*.h5",))
    assert sorted(path.name for path in copy.iterdir()) == [
        *("config.json", "model.safetensors", "spiece.model")
    ]
    assert (copy / "spiece.model").read_text() == "a hub's file"
    assert not (copy / "spiece.model").is_symlink()
    (base / "model.safetensors").unlink()  # then torch's own are the weights
    assert (copy_of(base, tmp_path / "scratch", unread=("*.h5",)) / "pytorch_model.bin").is_file()


def test_a_copy_that_was_cut_short_is_begun_anew(base: Path, tmp_path: Path) -> None:
    whole = copy_of(base, tmp_path / "scratch")
    part = whole.with_name(f"{whole.name}.part")
    whole.rename(part)
    (part / "config.json").write_text("ha")
    assert copy_of(base, tmp_path / "scratch") == whole
    assert (whole / "config.json").read_text() == "config.json"
    assert not part.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **_: object) -> None:
        target.mkdir()
        (target / "config.json").write_text("conf")
        raise shutil.Error([("from", "to", "[Errno 28] No space left on device")])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(
        StagingError, match=r"PEMT_STAGE_DIR: .*/base cannot be copied to .*No space left"
    ):
        copy_of(base, tmp_path / "scratch")
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [LOCK]
