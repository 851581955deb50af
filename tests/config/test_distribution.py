"""Which distribution this program is, where it came from, and the other `pemt` of PyPI beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from pemt.commands import doctor
from pemt.config import DISTRIBUTION, how_to_install, other_distribution, version_line
from tests.conftest import ROOT, python

GIT = {
    "url": "https://example.org/me/pemt.git",
    "vcs_info": {"vcs": "git", "commit_id": "0123abc", "requested_revision": "main"},
}


def install(
    site: Path,
    name: str,
    version: str,
    *,
    summary: str = "",
    command: str = "",
    direct_url: object = None,
) -> None:
    """What pip leaves of a distribution for importlib.metadata."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join([*lines, f"Summary: {summary}", "", ""]))
    if command:
        (folder / "entry_points.txt").write_text(f"[console_scripts]\npemt = {command}\n")
    if direct_url is not None:
        (folder / "direct_url.json").write_text(json.dumps(direct_url))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment of its own for what is found by name; empty."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


def test_the_name_is_the_one_in_setup_cfg() -> None:
    assert f"\nname = {DISTRIBUTION}\n" in (ROOT / "setup.cfg").read_text()


def test_installed_by_its_name(site: Path) -> None:
    install(site, "pemt-trainer", "9.8", direct_url={"url": "file:///a", "dir_info": {}})
    folder = ROOT / "pemt"
    assert version_line() == f"pemt 9.8 (distribution pemt-trainer, running from {folder})"
    assert other_distribution() is None
    assert how_to_install() == "`pip install .` in a checkout of pemt-trainer"
    assert doctor.installation().state == "ok"


def test_a_git_url_is_passed_on_unless_it_is_a_folder(site: Path) -> None:
    install(site, "pemt-trainer", "9.8", direct_url=GIT)
    source = "git+https://example.org/me/pemt.git@0123abc"
    assert version_line().endswith(f", from {source})")
    assert how_to_install() == f'`pip install "pemt-trainer @ {source}"`'
    (file,) = site.glob("*/direct_url.json")
    file.write_text(json.dumps({**GIT, "url": "file:///home/me/pemt"}))
    assert how_to_install() == "`pip install .` in a checkout of pemt-trainer"
    file.write_text("[no json")
    assert how_to_install() == "`pip install .` in a checkout of pemt-trainer"


def test_not_installed_at_all(site: Path) -> None:
    assert version_line().startswith("pemt (not installed as pemt-trainer, running from ")
    found = doctor.installation()
    assert (found.state, found.advice) == (
        "note",
        "for the command: `pip install .` in a checkout of pemt-trainer",
    )


def test_the_other_pemt_is_told_by_doctor(site: Path) -> None:
    install(site, "pemt", "1.2", summary="Patent literature", command="pemt.cli:main")
    install(site, "pemt-trainer", "9.8")
    other = other_distribution() or ""
    assert other.startswith("`pemt` 1.2 (Patent literature) is installed as well")
    assert "pip uninstall pemt pemt-trainer" in other
    found = doctor.installation()
    assert (found.state, found.advice) == ("note", other)


def test_an_installation_under_the_old_name_is_no_other_program(site: Path) -> None:
    install(site, "pemt", "0.1.0", command="pemt.__main__:program")
    assert "is this program under its old name" in (other_distribution() or "")


def test_the_command_tells_both(tmp_path: Path) -> None:
    install(tmp_path, "pemt", "1.2", summary="Patent literature")
    install(tmp_path, "pemt-trainer", "9.8")
    places = f"{tmp_path}{os.pathsep}{ROOT}"
    done = python("-m", "pemt", "--version", check=True, PYTHONPATH=places)
    assert done.stdout == (f"pemt 9.8 (distribution pemt-trainer, running from {ROOT / 'pemt'})\n")
    assert done.stderr.startswith("pemt: warning: `pemt` 1.2 (Patent literature) is installed")
    assert done.stderr.count("\n") == 1
