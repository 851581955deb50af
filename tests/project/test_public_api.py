"""The public interface is documented and typed, and the tools that check the project are the pinned ones."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import pemt

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "pemt").rglob("*.py"))
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(path: Path) -> Iterator[Documented]:
    """Functions and classes at a module's top whose names do not begin with an underscore."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or not text, "the module itself"
    assert [node.name for node in public_definitions(path) if not ast.get_docstring(node)] == []


def test_every_public_method_says_what_it_does() -> None:
    """In its own docstring, or in that of the method of pemt's that it stands in for."""
    classes = {
        node.name: node
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }

    def is_documented(owner: str, name: str) -> bool:
        node = classes.get(owner)
        if node is None:  # torch's, argparse's
            return False
        own = [each for each in node.body if isinstance(each, Documented) and each.name == name]
        inherited = any(is_documented(ast.unparse(base), name) for base in node.bases)
        return any(map(ast.get_docstring, own)) or inherited

    silent = [
        f"{owner}.{each.name}"
        for owner, node in classes.items()
        for each in node.body
        if isinstance(each, Documented) and not owner.startswith("_")
        if not each.name.startswith("_") and not is_documented(owner, each.name)
    ]
    assert silent == []


@pytest.mark.parametrize("name", pemt.__all__)
def test_the_public_interface_is_documented_and_typed(name: str) -> None:
    member = getattr(pemt, name)
    assert inspect.getdoc(member)
    methods = inspect.getmembers(member, inspect.isfunction) if inspect.isclass(member) else []
    for label, method in [(name, member), *methods]:
        if label.startswith("_") or not inspect.isfunction(inspect.unwrap(method)):
            continue
        if not method.__module__.startswith("pemt."):
            continue  # torch's own
        assert inspect.getdoc(method), label
        signature = inspect.signature(method)
        untyped = [
            each.name
            for each in signature.parameters.values()
            if each.annotation is inspect.Parameter.empty and each.name not in ("self", "cls")
        ]
        assert untyped == [], label
        assert signature.return_annotation is not inspect.Signature.empty, label


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    # a make above this one, as in `make test`, would have its folder announced
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == phony.split()


def test_a_checker_knows_what_there_is_to_import(tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text("from pemt import PemtModel, run_adapt\nfrom pemt import Nonsense\n")
    # alone with the front door: what the names behind it are, `make typecheck` sees to
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip"]
    command += ["--cache-dir", str(tmp_path / "cache"), "pemt/__init__.pyi", str(client)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [line.split(": ", 1)[1] for line in done.stdout.splitlines()[:-1]] == [
        'error: Module "pemt" has no attribute "Nonsense"  [attr-defined]'
    ]
    assert done.returncode == 1


def command_of(line: str) -> tuple[str, ...]:
    """`("ruff", "check")`: without options and files, which `make` names and pre-commit adds."""
    return tuple(word for word in line.split() if word[0] not in "-.$")


def test_pre_commit_runs_what_make_lint_runs() -> None:
    beside_python = Path(sys.executable).with_name("pre-commit")  # not on PATH everywhere
    subprocess.run([beside_python, "validate-config"], cwd=ROOT, check=True)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", (
        "nothing is fetched, nothing drifts from the pinned versions"
    )
    makefile = (ROOT / "Makefile").read_text()
    recipes = re.findall(r"^(?:lint|typecheck):.*\n((?:\t.*\n)+)", makefile, re.M)
    made = re.findall(r"\$\(BIN\)/(.*)", "".join(recipes))
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]]
    assert {command_of(line) for line in hooks} == {command_of(line) for line in made}
    assert len(hooks) == len(made) == 5
    for hook in repository["hooks"]:
        if "files" in hook:
            tracked = subprocess.run(
                ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert any(re.search(hook["files"], name) for name in tracked.stdout.splitlines())
