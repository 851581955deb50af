"""The project's rules that no linter checks: small files and functions, every dependency declared."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = {
    "a file of pemt": 350,
    "a native file": 410,
    "a file of the tests": 400,
    "a function": 50,
}

PACKAGE = sorted((ROOT / "pemt").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = ROOT / "pemt" / "ops" / "csrc"
NATIVE_FILES = sorted(path for path in SOURCES.rglob("*") if path.is_file())

# Needed, though nothing in pemt imports them: by torch.utils.tensorboard, by torch's C++ builds,
# by T5's tokenizer.
INDIRECT = {"ninja", "sentencepiece", "tensorboard"}
# Imported inside functions, and an extra of the same name installs it.
OPTIONAL = {"peft"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_and_functions_are_short() -> None:
    long: dict[str, int] = {}
    kinds = {"a file of pemt": PACKAGE, "a native file": NATIVE_FILES, "a file of the tests": TESTS}
    for kind, paths in kinds.items():
        long |= {name_of(p): n for p in paths if (n := lines_of(p)) > MOST_LINES[kind]}
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                count = node.end_lineno - node.lineno + 1
                if count > MOST_LINES["a function"]:
                    long[f"{name_of(path)}::{node.name}"] = count
    assert long == {}


def test_native_sources_are_finished() -> None:
    """ruff looks for these words in Python only."""
    words = ("TODO", "FIXME", "XXX")
    assert [name_of(p) for p in NATIVE_FILES if any(word in p.read_text() for word in words)] == []


def test_the_map_shows_every_package() -> None:
    text = (ROOT / "docs" / "CONTRIBUTING.md").read_text()
    picture, layer_lines = re.findall(r"^```text\n(.*?)^```", text, re.M | re.S)
    drawn = set(re.findall(r"^  (\w+)(?:/|\.py)", picture, re.M))
    packages = {each.name for each in (ROOT / "pemt").iterdir() if (each / "__init__.py").is_file()}
    loose = {path.stem for path in (ROOT / "pemt").glob("*.py")}
    assert loose == {"__init__", "__main__"}
    assert drawn == packages | loose | {"recipes"}
    (layers,) = re.findall(
        r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    assert layer_lines.splitlines() == re.findall(r'"(.+)"', layers)


def test_packages_are_imported_as_a_whole() -> None:
    """A name of another package is imported from that package, not from one of its files."""
    inner = []
    for path in PACKAGE:
        package = path.relative_to(ROOT / "pemt").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pemt."):
                of = str(node.module).split(".")
                if len(of) > 2 and of[1] not in (package, "ops", "commands"):
                    inner.append(f"{name_of(path)}: {node.module}")
    assert inner == []


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


def imported_with_the_file(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports when it is imported itself."""
    names, waiting = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def test_pemt_imports_without_its_extras() -> None:
    found = {name_of(path): imported_with_the_file(path) & OPTIONAL for path in PACKAGE}
    assert {path: names for path, names in found.items() if names} == {}


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
