"""Bad input: one clear line that names file and key, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest

import pemt.__main__
from pemt.config import ExpertConfig, PemtError
from pemt.config.deepspeed import DeepSpeedConfigError, fill_deepspeed_json, read_deepspeed_json
from pemt.engine.launcher import EngineError, check_world_size
from pemt.run.train import run_adapt, run_source
from tests.conftest import python, start_ranks
from tests.support.jobs import Job, clean
from tests.support.tiny import adapt_config, make_base, source_config, tiny_task, write_task_files

TASK = "tiny-errors"


class Exit(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, one task's files, and a bank of one source."""
    folder = tmp_path_factory.mktemp("errors")
    make_base(folder / "base")
    tiny_task(TASK)
    write_task_files(folder / "data", seed=0, rows=8)
    paths = (folder / "base", folder / "data", folder / "source", folder / "bank")
    run_source(source_config(*paths, TASK, expert=ExpertConfig(rank=2), max_steps=1))
    return folder


def complaint(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What `pemt ARGUMENTS` prints when it exits with 2."""

    def leave(code: int) -> None:
        raise Exit(code)

    monkeypatch.setattr(sys, "argv", ["pemt", *arguments])
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exit, match="2"):
        pemt.__main__.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert error.startswith("pemt: error: ")
    return error


def command(world: Path, *extra: str, stage: str = "adapt") -> list[str]:
    return [
        stage,
        *("--model_name_or_path", str(world / "base")),
        *("--data_dir", str(world / "data")),
        *("--output_dir", str(world / "new")),
        *("--bank_dir", str(world / "bank")),
        *("--task_name", TASK),
        *("--bf16", "false"),
        *extra,
    ]


# What else is wrong on the command line: test_imports.py.
CASES = {
    "unknown nested key": (["--mixture.weight", "1"], ["mixture.weight", "mixture."]),
    "no finite rate": (["--learning_rate", ".inf"], ["learning_rate", "inf", "finite"]),
    "no number": (["--mixture.sparsity_loss_weight", ".nan"], ["mixture.sparsity_loss_weight"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, parts = CASES[name]
    error = complaint(command(world, *extra), monkeypatch, capsys)
    for part in parts:
        assert part in error
    assert not (world / "new").exists(), (
        "something was written before the configuration was checked"
    )


YAML_CASES = {
    "unknown key": ("learning_rat: 1\n", ["run.yaml", "`learning_rat`", "`learning_rate`"]),
    "malformed": ("learning_rate: [1\nseed: 2\n", ["run.yaml", "line", "malformed"]),
    "a key twice": ("seed: 1\nseed: 2\n", ["run.yaml", "line 2", "duplicate key `seed`"]),
    "no mapping": ("- seed\n", ["run.yaml", "list"]),
    "wrong type": ("learning_rate: fast\n", ["run.yaml", "learning_rate", "fast", "float"]),
}


@pytest.mark.parametrize("name", YAML_CASES)
def test_one_line_about_yaml(
    world: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, parts = YAML_CASES[name]
    (tmp_path / "run.yaml").write_text(text)
    arguments = command(world, "--config", str(tmp_path / "run.yaml"))
    error = complaint(arguments, monkeypatch, capsys)
    for part in parts:
        assert part in error


DEEPSPEED_CASES = {
    "malformed": ('{"zero_optimization": {"stage": 2}', "malformed"),
    "a key twice": ('{"zero_optimization": {"stage": 2}, "bf16": {}, "bf16": {}}', "`bf16`"),
    "unknown section": ('{"zero_optimisation": {"stage": 2}}', "`zero_optimisation`"),
    "stage as text": ('{"zero_optimization": {"stage": "2"}}', 'found "2"'),
    "no stage": ("{}", "zero_optimization.stage"),
}


@pytest.mark.parametrize("name", DEEPSPEED_CASES)
def test_deepspeed_json_is_checked(name: str, tmp_path: Path) -> None:
    text, part = DEEPSPEED_CASES[name]
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(DeepSpeedConfigError, match=part) as caught:
        read_deepspeed_json(path)
    assert "ds.json" in str(caught.value)


def test_deepspeed_json_must_not_contradict_the_run(world: Path) -> None:
    config = adapt_config(world, world, world, world, TASK)
    path = Path("ds.json")
    content = {
        "zero_optimization": {"stage": 1},
        "gradient_clipping": "auto",
        "train_batch_size": 8,
    }
    filled = fill_deepspeed_json(content, config, world_size=2, path=path)
    assert filled["gradient_clipping"] == config.max_grad_norm
    assert filled["train_micro_batch_size_per_gpu"] == 4
    with pytest.raises(DeepSpeedConfigError, match=r"train_batch_size is 8.*12"):
        fill_deepspeed_json(content, config, world_size=3, path=path)


def test_ranks_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world_size(2)
    with pytest.raises(EngineError, match="started 2 ranks, but accelerate sees 1"):
        check_world_size(1)


def test_bank_of_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", d_model=24)
    config = adapt_config(other, world / "data", tmp_path / "out", world / "bank", TASK)
    with pytest.raises(PemtError, match=r"manifest.json.*d_model 16.*24"):
        run_adapt(config)
    assert not (tmp_path / "out").exists()


def test_a_row_without_its_field_names_file_and_line(world: Path, tmp_path: Path) -> None:
    data = write_task_files(tmp_path / "data", seed=0, rows=8)
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"txt": "the box", "label": 1})
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = adapt_config(world / "base", data, tmp_path / "out", world / "bank", TASK)
    with pytest.raises(PemtError, match=r"train.jsonl.*3.*text") as caught:
        run_adapt(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_written_over(world: Path) -> None:
    paths = (world / "base", world / "data", world / "source", world / "bank")
    with pytest.raises(
        PemtError, match=r"already holds a run.*resume_from_checkpoint.*overwrite_output_dir"
    ):
        run_source(source_config(*paths, TASK, expert=ExpertConfig(rank=2)))


@pytest.mark.launch
def test_two_ranks_complain_once(world: Path) -> None:
    options = ["--config_file", "launchers/accelerate/cpu.yaml", "--num_processes", "2"]
    options += ["--deepspeed_config_file", "ds_configs/zero2.json", "-m", "pemt"]
    words = [*options, *command(world, "--bank_dir", "nowhere")]
    with clean(Job(words, world / "told", {}, start=partial(start_ranks, forked=True))) as job:
        job.until(lambda: "pemt: error:" in job.output)
        assert job.end() != 0
    assert "forcefully" not in job.output, "the other rank ends before the launcher kills it"
    assert job.output.count("pemt: error:") == 1
    assert "pemt/" not in job.output.split("Traceback")[0], "a traceback of ours"
    assert "exitcode  : 2" in job.output


def test_exit_code_of_the_real_command(world: Path) -> None:
    done = python("-m", "pemt", "adapt", "--seed", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "pemt: error: seed: found `x`, expected int\n"
