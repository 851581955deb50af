"""What a person types first: the help, completion in a shell, the doctor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from pemt.commands import COMMANDS, doctor
from pemt.commands.overview import overview
from pemt.config import PemtError, version_line
from tests.conftest import ROOT, python, start_ranks

RAISED = {"TimeoutExpired": subprocess.TimeoutExpired}


def test_help_fits_a_screen_and_tells_of_every_command() -> None:
    lines = overview().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "two stages" in lines[4], "the main road comes first"
    for name in COMMANDS:
        assert any(f"  {name} " in line for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        COMMANDS[name](["--help"])
    assert left.value.code == 0
    assert f"pemt {name}" in capsys.readouterr().out.split("example:")[1]


def verbs_of(name: str) -> set[str]:
    return set(COMMANDS[name].make_parser().verbs())


def test_every_verb_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = [(name, verb) for name in COMMANDS for verb in verbs_of(name)]
    assert len(verbs) == 10 + 3
    for name, verb in verbs:
        with pytest.raises(SystemExit):
            COMMANDS[name]([verb, "--help"])
        assert f"pemt {name} {verb} " in capsys.readouterr().out.split("example:")[1]


WRONG = {
    "bank show bank": r"pemt bank show: .*task; `pemt bank show --help` tells",
    "bank add --peft x --bank_dir b --task t --revsion 1": r"pemt bank add: .*did you mean `--revision`",
    "demo --quik": r"pemt demo: unknown argument `--quik`; did you mean `--quick`\?",
    "bench op --cuda_graph": r"pemt bench op: --cuda_graph needs --device cuda",
    "bench op --shape t5-huge": r"pemt bench op: argument --shape: invalid choice: 't5-huge'",
    "bench step --rouds 3": r"pemt bench step: unknown argument `--rouds`; did you mean `--rounds`",
    "bench step --shape t5-base": r"pemt bench step: unknown argument `--shape`; did you mean (?!`--shape`)",
    "predict run --input_fil x": r"pemt predict: .*`--input_fil`; did you mean `--input_file`",
    "predict run --batch_size abc": r"pemt predict: argument --batch_size: found `abc`, a whole",
    "evaluate run --num_beam 4": r"pemt evaluate: unknown argument `--num_beam`; did .*`--num_beams`",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_option_is_one_line(line: str) -> None:
    name, *arguments = line.split()
    with pytest.raises(PemtError, match=WRONG[line]) as complaint:
        COMMANDS[name](arguments)
    assert "\n" not in str(complaint.value)


def test_a_task_tells_what_it_reads_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    COMMANDS["tasks"](["superglue-cb"])
    told = capsys.readouterr().out
    assert "template        premise: {premise} hypothesis: {hypothesis}\n" in told
    assert "answers         0 (entailment), 1 (contradiction), 2 (neutral)\n" in told
    assert "hub             aps/super_glue cb\n" in told
    for name, answer in (("stsb", "numbers, in steps of 0.2"), ("squad", "text"), ("piqa", "0, 1")):
        COMMANDS["tasks"]([name])
        assert f"answers         {answer}\n" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("name: mine\nlike: rte\nlabels: [so, not so]\n")
    COMMANDS["tasks"](["--task_file", str(tmp_path / "mine.yaml")])
    told = capsys.readouterr().out
    assert "task            mine\n" in told
    assert "answers         so (entailment), not so (not_entailment)\n" in told
    with pytest.raises(PemtError, match="found 'superglue-bc', which is no known task; nearest"):
        COMMANDS["tasks"](["superglue-bc"])


def test_version() -> None:
    done = python("-m", "pemt", "--version")
    assert done.stdout == f"{version_line()}\n", done.stderr


def test_a_reader_that_has_gone_is_no_error() -> None:
    """`pemt tasks | head -1` where head is quicker: no traceback, and the status that SIGPIPE gives."""
    program = """
import sys, time
from pemt import __main__, commands
sys.stdin.read()  # until the reader has gone
sys.argv[1:] = ["tasks"]
__main__.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 128 + 13
    assert process.stderr.read() == b""


def completed(script: Path, line: str) -> set[str]:
    """What a real bash offers at the end of a line."""
    words = line.split(" ")
    program = f"""
    source {script}
    COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}"); COMP_CWORD={len(words) - 1}
    $(complete -p pemt | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {word.strip() for word in done.stdout.splitlines()}


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["completion"](["bash"])
    script = tmp_path / "pemt.bash"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "pemt ") >= COMMANDS.keys()
    assert completed(script, "pemt ba") == {"bank"}
    assert completed(script, "pemt --ver") == {"--version"}
    for name in ("bank", "bench"):
        assert completed(script, f"pemt {name} ") == verbs_of(name)
    assert completed(script, "pemt bench op --sh") == {"--shape"}
    assert completed(script, "pemt demo --q") == {"--quick"}
    assert completed(script, "pemt adapt --print") == {"--print_config"}
    assert completed(script, "pemt evaluate run --bank") == {"--bank_dir"}
    assert completed(script, "pemt predict run --num_b") == {"--num_beams"}
    for command in ("source", "adapt", "evaluate run"):
        assert completed(script, f"pemt {command} --config so") == {"source"}
        assert completed(script, f"pemt {command} --config setup.c") == {"setup.cfg"}
    assert completed(script, "pemt adapt --mixture.pro") == {"--mixture.prompt_dropout"}
    assert completed(script, "pemt adapt --task_name superglue-w") == {
        "superglue-wic",
        "superglue-wsc-fixed",
    }
    assert completed(script, "pemt source --expert.kind ") == {"lora", "bottleneck"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["completion"](["zsh"])
    (tmp_path / "_pemt").write_text(capsys.readouterr().out)
    program = (
        f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u -D; print $_comps[pemt]"
    )
    done = subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_pemt"
    subprocess.run(["zsh", "-n", tmp_path / "_pemt"], check=True)


def test_doctor_tells_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.what: finding for finding in doctor.packages()}
    assert found["torch"].state == "ok"
    assert found["torch"].found == version("torch")
    monkeypatch.setattr(doctor, "PACKAGES", ("accelerate", "no-such-package"))
    needed = Requirement("accelerate==0.1.*")
    monkeypatch.setattr(doctor, "_needed", lambda: {"accelerate": needed})
    *_, wrong, absent = doctor.packages()
    assert wrong.state == absent.state == "missing"
    assert wrong.advice == "pip install 'accelerate==0.1.*'"
    assert str(wrong).splitlines()[1] == "      -> pip install 'accelerate==0.1.*'"
    assert absent.advice == "pip install no-such-package"


def test_doctor_on_machines_with_and_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (none,) = doctor.devices()
    if not torch.cuda.is_available():
        assert none.state == "note"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cards = [
        SimpleNamespace(name="V100", total_memory=16 * 2**30, major=7, minor=0),
        SimpleNamespace(name="A100", total_memory=80 * 2**30, major=8, minor=0),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    old, new = doctor.devices()
    assert "fp32" in old.advice
    assert new.found == "A100, 80 GiB, sm_80"


@pytest.mark.launch
@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_doctor_really_starts_deepspeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: bool
) -> None:
    """In fresh interpreters, as it does itself, in `make soak`."""

    def run(command: list[str], *, env: dict[str, str], timeout: int, **_: object) -> Any:
        out = tmp_path / "out"
        status = start_ranks(command[3:], out, env, forked=True).wait(timeout)
        return subprocess.CompletedProcess(command, status, out.read_text(), "")

    if forked:
        monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=run, **RAISED))
    found = doctor.deepspeed_runs()
    ranks = min(2, torch.cuda.device_count()) or 2
    assert found.state == "ok", found
    assert found.found.startswith(f"yes: {ranks} rank(s), ZeRO-2, ")


@pytest.mark.launch
@pytest.mark.soak
def test_doctor_notices_where_deepspeed_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._PROBE_JSON, "zero_optimisation", {"stage": 2})
    broken = doctor.deepspeed_runs()
    assert broken.state == "missing"
    assert "`zero_optimisation`" in broken.found
    assert "pemt.engine.probe" in broken.advice


def test_doctor_from_the_command_line() -> None:
    done = python("-m", "pemt", "doctor", "--no_launch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ready"


@pytest.mark.parametrize("absent", [("torch",), doctor.PACKAGES], ids=["torch", "all"])
def test_doctor_tells_of_what_it_cannot_import(absent: tuple[str, ...]) -> None:
    program = f"""
import importlib.machinery, importlib.metadata, sys
absent, version = {absent!r}, importlib.metadata.version
find = importlib.machinery.PathFinder.find_spec
def not_found(name, path=None, target=None):
    return None if name.split(".")[0] in absent else find(name, path, target)
def no_version(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.machinery.PathFinder.find_spec = not_found
importlib.metadata.version = no_version
from pemt.__main__ import main
sys.argv = ["pemt", "doctor"]
main()
"""
    done = python("-c", program)
    assert done.returncode == 2
    for name in absent:
        assert f"MISS  {name}: not installed\n      -> pip install {name}\n" in done.stdout
    assert done.stderr.startswith(f"pemt: error: a run cannot start here: {absent[0]}")
    assert done.stderr.count("\n") == 1
