"""What a person types first: the help, completion in a shell, the doctor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pemt import doctor
from pemt.commands import COMMANDS, PARSERS, completion
from pemt.commands.overview import AROUND, overview
from pemt.config import PemtError

STAGES = {"source", "adapt"}


def test_help_fits_a_screen_and_tells_of_every_command() -> None:
    lines = overview().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert AROUND.keys() | STAGES == COMMANDS.keys()
    assert "two stages" in lines[4], "the main road comes first"
    for name in COMMANDS:
        assert any(f"  {name} " in line for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        COMMANDS[name](["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    if "VERB" not in out:
        assert f"pemt {name}" in out.split("example:")[1]


def verbs_of(name: str) -> Iterator[str]:
    for action in PARSERS[name]()._actions:
        if isinstance(action.choices, dict):
            yield from action.choices


def test_every_verb_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = list(verbs_of("bank"))
    assert len(verbs) == 8
    for verb in verbs:
        with pytest.raises(SystemExit):
            COMMANDS["bank"]([verb, "--help"])
        assert f"pemt bank {verb} " in capsys.readouterr().out.split("example:")[1]


def test_a_wrong_option_is_one_line() -> None:
    with pytest.raises(PemtError, match=r"pemt bank show: .*task; `pemt bank show --help` tells"):
        COMMANDS["bank"](["show", "bank"])


def completed(script: Path, line: str) -> set[str]:
    """What a real bash offers at the end of a line."""
    words = line.split(" ")
    program = f"""
    source {script}
    COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}"); COMP_CWORD={len(words) - 1}
    $(complete -p pemt | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return {word.strip() for word in done.stdout.splitlines()}


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completion(["bash"])
    script = tmp_path / "pemt.bash"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "pemt ") >= COMMANDS.keys()
    assert completed(script, "pemt ba") == {"bank"}
    assert completed(script, "pemt bank ") >= set(verbs_of("bank"))
    assert completed(script, "pemt adapt --mixture.pro") == {"--mixture.prompt_dropout"}
    assert completed(script, "pemt adapt --task_name superglue-w") == {
        "superglue-wic",
        "superglue-wsc-fixed",
    }
    assert completed(script, "pemt source --expert.kind ") == {"lora", "bottleneck"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completion(["zsh"])
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
    needed = doctor.Requirement("accelerate==0.1.*")
    monkeypatch.setattr(doctor, "_needed", lambda: {"accelerate": needed})
    _, wrong, absent = doctor.packages()
    assert wrong.state == absent.state == "missing"
    assert wrong.advice == "pip install 'accelerate==0.1.*'"
    assert wrong.lines()[1] == "      -> pip install 'accelerate==0.1.*'"
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
    assert "--bf16 false" in old.advice
    assert new.found == "A100, 80 GiB, sm_80"


@pytest.mark.launch
def test_doctor_really_starts_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.deepspeed_runs()
    ranks = min(2, torch.cuda.device_count()) or 2
    assert found.state == "ok", found
    assert found.found.startswith(f"yes: {ranks} rank(s), ZeRO-2, ")

    # and it notices where DeepSpeed does not run
    monkeypatch.setitem(doctor._PROBE_JSON, "zero_optimisation", {"stage": 2})
    broken = doctor.deepspeed_runs()
    assert broken.state == "missing"
    assert "`zero_optimisation`" in broken.found
    assert "pemt.engine.probe" in broken.advice


def test_doctor_from_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pemt", "doctor", "--no_launch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ready"
