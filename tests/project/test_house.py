"""The house rules that no linter holds: small files and functions, every dependency declared."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pemt.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES_A_FILE = 400
MOST_LINES_A_FUNCTION = 60

PYTHON_FILES = sorted([*(ROOT / "pemt").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
SOURCES = ROOT / "pemt" / "ops" / "csrc"
NATIVE_FILES = sorted(path for path in SOURCES.rglob("*") if path.is_file())

# Needed, though nothing in pemt imports them: by torch.utils.tensorboard, by torch's C++ builds,
# by T5's tokenizer.
INDIRECT = {"ninja", "sentencepiece", "tensorboard"}
# Imported inside functions, and an extra of the same name installs it.
OPTIONAL = {"peft"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PYTHON_FILES, *NATIVE_FILES], ids=name_of)
def test_a_file_does_one_thing(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_A_FILE


@pytest.mark.parametrize("path", [p for p in PYTHON_FILES if "pemt" in p.parts[:-1]], ids=name_of)
def test_a_function_fits_a_screen(path: Path) -> None:
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MOST_LINES_A_FUNCTION
    ]
    assert long == []


@pytest.mark.parametrize("path", NATIVE_FILES, ids=name_of)
def test_native_sources_are_finished(path: Path) -> None:
    """ruff looks for these words in Python only."""
    text = path.read_text(encoding="utf-8")
    assert [word for word in ("TODO", "FIXME", "XXX") if word in text] == []


def drawn() -> set[str]:
    """Files and folders in CONTRIBUTING's picture of the house, below the root."""
    text = (ROOT / "docs" / "CONTRIBUTING.md").read_text()
    (picture,) = re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)
    folders: list[str] = []
    paths = set()
    for line in picture.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(", "):
            if name.endswith("/"):
                folders[depth:] = [name]
            paths.add("".join(folders[:depth]) + name)
    return paths


def test_the_picture_of_the_house_shows_every_file() -> None:
    files = {name_of(path) for path in (ROOT / "pemt").rglob("*.py") if path.name != "__init__.py"}
    shown = {path for path in drawn() if path.startswith("pemt/") and path.endswith(".py")}
    assert files == shown
    assert [path for path in drawn() if not (ROOT / path).exists()] == []


def declared(section: str, key: str) -> set[str]:
    """Canonical names of the requirements under one key of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = [
        line for line in parser[section][key].splitlines() if line and not line.startswith("#")
    ]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported_packages() -> Iterator[tuple[str, Path]]:
    """Top-level names of the third-party packages that pemt imports."""
    for path in (ROOT / "pemt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top != "pemt":
                    yield top, path


def test_setup_cfg_declares_exactly_what_is_imported() -> None:
    owners = packages_distributions()
    imported = {canonicalize_name(owners[top][0]) for top, _ in imported_packages()}
    assert imported - OPTIONAL | INDIRECT == declared("options", "install_requires")
    for name in OPTIONAL & imported:
        assert name in declared("options.extras_require", name)


def test_pemt_imports_without_its_extras() -> None:
    commands = ", ".join(f"pemt.commands.{name}" for name in COMMANDS)
    every = f"import {commands}"
    blocked = "".join(f"sys.modules['{name}'] = None; " for name in OPTIONAL)
    program = f"import sys; {blocked}import pemt.run.train, pemt.model; {every}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def pins() -> list[Requirement]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_every_constraint_is_one_public_release() -> None:
    for pin in pins():
        assert pin.url is None
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert "+" not in specifier.version, f"{pin}: a build for one machine only"


def test_every_declared_package_is_pinned_for_every_python() -> None:
    needed = declared("options", "install_requires") | declared("options.extras_require", "dev")
    for python in ("3.10", "3.11", "3.13"):
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        pinned = {
            canonicalize_name(pin.name)
            for pin in pins()
            if pin.marker is None or pin.marker.evaluate(environment)
        }
        assert needed - pinned == set(), python
