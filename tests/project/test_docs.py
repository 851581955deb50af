"""The documentation is true: pages up to date, links and named tests there, YAML read, the tutorial run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

import pemt
from pemt.config.schema import AdaptConfig
from pemt.sweep.plan import KEYS
from pemt.tasks import get_task, load_task_file
from pemt.tasks.registry import _TASKS
from tests.conftest import ROOT, python
from tests.support.docs_pages import PAGES, blocks, name_of


def test_a_task_registered_as_told_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[AdaptConfig] = []
    monkeypatch.setattr(pemt, "run_adapt", ran.append)
    monkeypatch.setattr("pemt.tasks.registry._TASKS", {})  # it shall be forgotten again
    (text,) = (text for _, text in blocks("python") if "register_task" in text)
    exec(text, {})
    (config,) = ran
    assert get_task(config.task_name).labels == ("no", "yes")


@pytest.mark.parametrize("found", [*blocks("yaml")], ids=lambda found: found[1][:30].strip())
def test_yaml_is_read(found: tuple[Path, str], tmp_path: Path) -> None:
    content = yaml.safe_load(found[1])
    path = tmp_path / "file.yaml"
    path.write_text(found[1])
    if {"template", "like"} & set(content):
        assert load_task_file(str(path)).name == content["name"]
    else:
        assert set(content) <= set(KEYS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_and_tests_exist(page: Path) -> None:
    for path, test in re.findall(
        r"`((?:tests|pemt|launchers)/[\w/.]+)(?:::(\w+))?`", page.read_text()
    ):
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in contents, page.name


def test_generated_pages_are_up_to_date() -> None:
    """In a process of its own: other tests register tasks."""
    program = (
        "from docs.generate import pages\nfor p, t in pages().items(): assert p.read_text() == t, p"
    )
    done = python("-c", program)
    assert done.returncode == 0, f"run `make docs`\n{done.stderr}"


def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "docs" / "tutorial.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    monkeypatch.setattr("pemt.tasks.registry._TASKS", {**_TASKS})  # its own are forgotten again
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    accuracy = re.search(r"accuracy on the test split: ([\d.]+) %", out)
    assert accuracy is not None
    assert float(accuracy[1]) > 60, "better than a guess"
    assert out.splitlines()[-1].startswith("['")
