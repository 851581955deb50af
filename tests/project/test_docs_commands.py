"""Every command on the documentation's pages is executed, those in sentences too.

pemt ...            runs, in a small world (tests/support/docs_world.py): its own base model and data, one step
                    long; what it is to make is taken away first, and has to be there afterwards. But:
    demo            its command line is read (tests/demo/test_demo.py runs it)
    doctor          without its launch (tests/commands/test_commands.py has it)
    push, pull      and `bank add`, `push`, `pull`, `fetch`: against tests/support/hub.py
    sweep           one run of the page's table, or of the recipe it names; the whole table is checked
    bench           one round on a smaller model
accelerate launch   accelerate's parser reads its options, the files it names exist; pemt's part runs as above
launchers/...       run with --dry_run
make                `make --dry-run`
tensorboard         its own parser
pip install, pytest, python -m, pre-commit      what they name exists
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from tensorboard.program import TensorBoard

import pemt.__main__
from pemt.commands import COMMANDS
from pemt.commands.fetch import PLACES
from pemt.config import read_yaml_mapping, sweep_file
from pemt.config.parse import RECIPES
from pemt.plan.shapes import KNOWN
from pemt.sweep.plan import read_sweep
from tests.bench.test_step import SMALL
from tests.conftest import ROOT
from tests.support.docs_pages import blocks, commands, name_of, words_of
from tests.support.docs_world import (
    LORAHUB_IDS,
    STAND_INS,
    make_repositories,
    make_world,
    stage,
    write_one_run,
)
from tests.support.hub import hub_for_this_process

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_world()
    return folder


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, as the working directory."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def test_there_is_something_to_try() -> None:
    tried = {" ".join(words_of(line)[:2]) for line in commands()}
    assert {f"pemt {name}" for name in COMMANDS} <= tried
    verbs = {words_of(line)[2] for line in commands() if line.startswith("pemt bank ")}
    assert verbs > {"add", "export", "import-official"}


@pytest.mark.parametrize("line", commands())
def test_a_command(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    for start, try_it in TRIALS.items():
        if words[: len(start.split())] == start.split():
            return try_it(words, monkeypatch)
    pytest.fail(f"{commands()[line]}: nobody knows how to try `{line}`")


def try_pemt(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = [STAND_INS.get(word, word) for word in words[1:]]
    if name == "--version":
        monkeypatch.setattr(sys, "argv", ["pemt", name])
        pemt.__main__.main()
    elif "--help" in arguments:
        with pytest.raises(SystemExit) as left:
            COMMANDS[name](arguments)
        assert left.value.code == 0
    elif not is_only_named(name, arguments):
        made = made_by(name, arguments)
        for path in made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        RUNS.get(name, run_as_it_stands)(name, arguments, monkeypatch)
        assert [path for path in made if not path.exists()] == []


def is_only_named(name: str, arguments: list[str]) -> bool:
    """`pemt adapt`, `pemt bank show`, `pemt adapt --method lora`: no command lines, but what they name exists."""
    parser = COMMANDS[name].make_parser()
    if arguments and arguments[0] in parser.verbs():
        return len(arguments) == 1
    most = 2 if name in ("source", "adapt", "evaluate") else 1  # which run with more alone
    if 1 <= len(arguments) <= most and arguments[0].startswith("--"):
        assert arguments[0] in parser.options()
        return True
    return not arguments and name not in ("tasks", "doctor")


def made_by(name: str, arguments: list[str]) -> list[Path]:
    """What a command is to leave behind."""
    flags = dict(pairwise(arguments))
    bank = Path(flags.get("--bank_dir", "bank"))
    return {
        "source": lambda: [Path(flags["--output_dir"]), bank / flags["--task_name"]],
        "adapt": lambda: [Path(flags["--output_dir"])],
        "sweep": lambda: [Path(read_yaml_mapping(sweep_of(flags))["output_dir"], "sweep.md")],
        "evaluate": lambda: [Path(arguments[0], f"{flags['--split']}_results.json")],
        "predict": lambda: [Path(flags[key]) for key in ("--output_file",) if key in flags],
        "report": lambda: [Path(flags.get("--output_dir", arguments[0]), "report.html")],
        "export": lambda: [Path(arguments[1])],
        "push": lambda: [Path("hub/repositories", arguments[1], "README.md")],
        "pull": lambda: [Path(arguments[1])],
        "fetch": lambda: [
            *([Path(flags["--to"], "pemt-fetched.txt")] if "--to" in flags else []),
            *([bank] if {"--peft", "--bank"} & set(flags) else []),
        ],
        "bank": lambda: made_in_bank(arguments, bank, flags),
    }.get(name, list)()


def made_in_bank(arguments: list[str], bank: Path, flags: dict[str, str]) -> list[Path]:
    """What a verb of `pemt bank` is to leave behind."""
    entries = [bank / Path(each).name for each in arguments if each in LORAHUB_IDS]
    return {
        "export": lambda: [Path(flags["--peft"])],
        "add": lambda: entries or [bank / flags["--task"]],
        "import-official": lambda: [bank / flags["--task"]],
        "push": lambda: [Path("hub/repositories", arguments[1], "README.md")],
        "pull": lambda: [bank],
    }.get(arguments[0], list)()


def run_as_it_stands(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("new.jsonl", encoding="utf-8") as asked:
        monkeypatch.setattr(sys, "stdin", asked)  # `pemt predict` without --input_file
        COMMANDS[name](arguments)


def run_stage(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stage(name, arguments)


def run_plan(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a recipe one task and seed; tests/sweep/test_paper.py plans, and counts, the hundreds of runs."""
    if "--sweep" in arguments:
        content = read_yaml_mapping(sweep_file(dict(pairwise(arguments))["--sweep"]))
        content["seeds"] = content["seeds"][:1]
        content["tasks"] = dict(list(content["tasks"].items())[:1])
        if "published" in content:
            content["published"]["numbers"] = {}
        Path("small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        monkeypatch.setattr("pemt.sweep.read_sweep", lambda _: read_sweep(Path("small.yaml")))
    COMMANDS[name](arguments)


def run_sweep(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = sweep_of(dict(pairwise(arguments)))
    if path.is_relative_to(RECIPES):
        write_one_run("sweep.yaml", path.read_text())
    else:
        assert len(read_sweep(Path("whole.yaml")).runs) > 10
    COMMANDS[name](["--config", "sweep.yaml"])


def sweep_of(flags: dict[str, str]) -> Path:
    return sweep_file(flags["--config"])


def run_bench(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for size in KNOWN:
        monkeypatch.setitem(KNOWN, size, SMALL)
    COMMANDS[name]([*arguments, "--rounds", "1"])


def run_fetch(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this world's base and data; tests/commands/test_fetch.py has it fetch something."""
    task = dict(pairwise(arguments))["--task_name"]
    small = ["--model_name_or_path", "base", "--data_dir", f"data/{task}"]
    monkeypatch.setenv("HF_HOME", "set back behind the test")
    for place in PLACES:
        monkeypatch.delenv(place, raising=False)
    with hub_for_this_process(make_repositories()):
        COMMANDS[name]([*arguments, *small])


def run_doctor(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    COMMANDS[name]([*arguments, "--no_launch"])


def read_only(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    COMMANDS[name].make_parser().parse_args(arguments)


def run_on_the_hub(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A push makes its repository."""
    repositories = make_repositories()
    if "push" in (name, arguments[0]):
        shutil.rmtree(repositories / arguments[1])
    with hub_for_this_process(repositories):
        COMMANDS[name](arguments)


Run = Callable[[str, list[str], pytest.MonkeyPatch], None]
RUNS: dict[str, Run] = {
    "source": run_stage,
    "adapt": run_stage,
    "sweep": run_sweep,
    "plan": run_plan,
    "bench": run_bench,
    "doctor": run_doctor,
    "fetch": run_fetch,
    "demo": read_only,
    "push": run_on_the_hub,
    "pull": run_on_the_hub,
    "bank": run_on_the_hub,
}


def try_launch(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = launch_command_parser().parse_args(words[2:])
    for path in (options.config_file, options.deepspeed_config_file):
        assert path is None or Path(path).is_file(), path
    assert options.module
    assert options.training_script == "pemt"
    try_pemt(["pemt", *options.training_script_args], monkeypatch)


def try_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--dry_run" in words, "in the docs, a script starts nothing by itself"
    assert "pemt" in output_of(words)


def try_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Naming Python spares make the start of each that it would look for, every time.
    python = f"PYTHON={sys.executable}"
    assert output_of(["make", "--dry-run", "--always-make", python, *words[1:]])


def try_tensorboard(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    TensorBoard().configure(words)


def try_pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    for package in words[2:]:
        match = re.fullmatch(r"(?:-e|\.)(?:\[(\w+)\])?|pre-commit|peft>=0\.19", package)
        assert match, package
        assert match[1] is None or match[1] in parser["options.extras_require"]


def try_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec(words[2]) is not None


def try_paths(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ROOT / words[1]).exists()


def output_of(words: list[str]) -> str:
    # launchers ask `python -m pemt plan batch`
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRIALS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "pemt": try_pemt,
    "accelerate launch": try_launch,
    "bash launchers/local.sh": try_script,
    "bash launchers/slurm_source.sbatch": try_script,
    "bash launchers/slurm_adapt.sbatch": try_script,
    "bash launchers/slurm_check.sbatch": try_script,
    "bash launchers/torchrun.sh": try_script,
    "make": try_make,
    "tensorboard": try_tensorboard,
    "pip install": try_pip,
    "python -m": try_python,
    "pytest": try_paths,
    ".venv/bin/pre-commit": lambda *_: try_paths(["", ".pre-commit-config.yaml"], *_[1:]),
}


# tests/project/test_docs.py tries the task that is registered, as far as a run that needs the hub.
OFFLINE = [found for found in blocks("python") if "register_task" not in found[1]]


@pytest.mark.parametrize("page", {path: None for path, _ in OFFLINE}, ids=name_of)
def test_python_runs(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page, one after another; each of them shows something."""
    names: dict[str, object] = {}
    for path, text in OFFLINE:
        if path == page:
            here = text.replace("google-t5/t5-base", "base").replace("google/flan-t5-large", "base")
            exec(compile(here, name_of(path), "exec"), names)
            assert capsys.readouterr().out, text
