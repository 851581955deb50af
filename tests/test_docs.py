"""The documentation is true: pages up to date, links and named tests there, every command tried.

How a command of a fenced block is tried:

    pemt source|adapt|sweep     by its own parser; the first two with --print_config, which runs nothing
    pemt tasks|ops info|doctor  run as they stand (doctor without its launch)
    other pemt commands         read by the command's own parser
    accelerate launch … -m pemt its own parser, the files it names, then pemt's part as above
    launchers/…                 run with --dry_run
    make …                      `make --dry-run`
    pip install, tensorboard, pytest, python -m, python FILE    what they name exists
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from pemt.arguments import parse_config
from pemt.commands import COMMANDS
from pemt.config import AdaptConfig, SourceConfig
from pemt.sweep.plan import KEYS
from pemt.tasks import load_task_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "ds_configs" / "README.md", *ROOT.glob("docs/*.md")])
SHELL = ("", "bash", "sh")
STAGES = {"source": SourceConfig, "adapt": AdaptConfig}
RUN_AS_THEY_STAND = {("tasks",), ("ops", "info")}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    for path in PAGES:
        for found, text in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.M | re.S):
            if found == language:
                yield path, text


def commands() -> list[tuple[str, str]]:
    """(page, command) of every shell block, continued lines joined, comments and assignments kept apart."""
    found = []
    for language in SHELL:
        for path, text in blocks(language):
            lines = text.replace("\\\n", " ").replace(" && ", "\n").splitlines()
            found += [(name_of(path), line.strip()) for line in lines if words_of(line)]
    return found


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_there_is_something_to_try() -> None:
    assert len(commands()) > 25
    tried = {words_of(line)[1] for _, line in commands() if words_of(line)[0] == "pemt"}
    assert {"source", "adapt", "evaluate", "predict", "export", "push", "pull", "doctor"} <= tried


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value.strip()[:60])
def test_a_command(page: str, line: str, tmp_path: Path) -> None:
    words = words_of(line)
    environment = dict(os.environ)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    program = next(
        (try_it for start, try_it in TRIALS.items() if line_starts(words, start)), no_such_command
    )
    program(words, environment, tmp_path)


def line_starts(words: list[str], start: str) -> bool:
    return words[: len(start.split())] == start.split()


def no_such_command(words: list[str], environment: dict[str, str], folder: Path) -> None:
    pytest.fail(f"nobody knows how to try `{' '.join(words)}`")


def try_pemt(words: list[str], environment: dict[str, str], folder: Path) -> None:
    name, arguments = words[1], words[2:]
    if name in STAGES:
        arguments = with_stand_ins(arguments, folder)
        with pytest.raises(SystemExit) as left:
            parse_config(STAGES[name], [*arguments, "--print_config"], prog=f"pemt {name}")
        assert left.value.code in (0, None)
        parse_config(STAGES[name], arguments, prog=f"pemt {name}")
    elif tuple(words[1:]) in RUN_AS_THEY_STAND:
        assert_runs([sys.executable, "-m", "pemt", *words[1:]], environment)
    elif "--help" in arguments:
        assert name in COMMANDS
        with pytest.raises(SystemExit) as left:
            COMMANDS[name]([*(each for each in arguments if each != "--help"), "--help"])
        assert left.value.code == 0
    else:
        options, rest = COMMANDS[name].make_parser().parse_known_args(arguments)
        assert options is not None
        if name in ("evaluate", "predict"):  # what is left are fields of the run
            fields = with_stand_ins(["--config", "adapt", *rest], folder)
            required = ["--task_name", "rte", "--output_dir", "x", "--bank_dir", "x"]
            parse_config(AdaptConfig, [*required, *fields], prog=f"pemt {name}")
        else:
            assert rest == []


def with_stand_ins(arguments: list[str], folder: Path) -> list[str]:
    """The files that a reader has and this test has not: a task of one's own."""
    for place, word in enumerate(arguments):
        if word == "--task_file":
            (_, text) = next(found for found in blocks("yaml") if "template:" in found[1])
            (folder / "task.yaml").write_text(text)
            arguments = [
                *arguments[: place + 1],
                str(folder / "task.yaml"),
                *arguments[place + 2 :],
            ]
    return arguments


def try_launch(words: list[str], environment: dict[str, str], folder: Path) -> None:
    options = launch_command_parser().parse_args(words[2:])
    for path in (options.config_file, options.deepspeed_config_file):
        assert path is None or (ROOT / path).is_file(), path
    assert options.module
    assert options.training_script == "pemt"
    try_pemt(["pemt", *options.training_script_args], environment, folder)


def try_script(words: list[str], environment: dict[str, str], folder: Path) -> None:
    assert (ROOT / words[1]).is_file()
    assert "--dry_run" in words, "in the docs, a script starts nothing by itself"
    assert "pemt" in assert_runs(words, environment)


def try_make(words: list[str], environment: dict[str, str], folder: Path) -> None:
    assert_runs(["make", "--dry-run", "--always-make", *words[1:]], environment)


def try_pip(words: list[str], environment: dict[str, str], folder: Path) -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    for package in words[2:]:
        match = re.fullmatch(r"(?:-e|\.|pemt)(?:\[(\w+)\])?|pre-commit", package)
        assert match, package
        assert match[1] is None or match[1] in parser["options.extras_require"]


def try_python(words: list[str], environment: dict[str, str], folder: Path) -> None:
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert (ROOT / words[1]).is_file()


def try_paths(words: list[str], environment: dict[str, str], folder: Path) -> None:
    for word in words[1:]:
        if "/" in word:
            assert (ROOT / word).exists(), word


def assert_runs(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRIALS = {
    "pemt": try_pemt,
    "accelerate launch": try_launch,
    "bash launchers/local.sh": try_script,
    "bash launchers/slurm_source.sbatch": try_script,
    "bash launchers/slurm_adapt.sbatch": try_script,
    "bash launchers/torchrun.sh": try_script,
    "make": try_make,
    "pip install": try_pip,
    "python": try_python,
    "pytest": try_paths,
    "pre-commit": lambda *_: (ROOT / ".pre-commit-config.yaml").read_text(),
}


@pytest.mark.parametrize("found", [*blocks("python")], ids=lambda found: name_of(found[0]))
def test_python_names_what_there_is(found: tuple[Path, str]) -> None:
    """tests/test_publish.py runs the same three lines on a real export."""
    imports = [line for line in found[1].splitlines() if line.startswith(("import", "from"))]
    compile(found[1], name_of(found[0]), "exec")
    exec("\n".join(imports), {})


@pytest.mark.parametrize("found", [*blocks("yaml")], ids=lambda found: found[1][:30].strip())
def test_yaml_is_read(found: tuple[Path, str], tmp_path: Path) -> None:
    content = yaml.safe_load(found[1])
    path = tmp_path / "file.yaml"
    path.write_text(found[1])
    if "template" in content:
        assert load_task_file(str(path)).name == content["name"]
    else:
        assert set(content) <= set(KEYS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_a_sentence_exist(page: Path) -> None:
    for name, verb in re.findall(r"`pemt ([a-z]\w*)(?: ([a-z-]+))?", page.read_text()):
        assert name in COMMANDS, name
        if name in ("bank", "ops") and verb:
            assert verb in COMMANDS[name].make_parser()._actions[-1].choices, f"{name} {verb}"


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
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run `make docs`\n{done.stderr}"


def test_the_tutorial_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "tutorial.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"accuracy on the test split: ([\d.]+) %", done.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 60, "better than a guess"
    assert done.stdout.splitlines()[-1].startswith("['")
