"""launchers/: files that accelerate takes, scripts without shell traps, launches that end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parent.parent
YAMLS = sorted((ROOT / "launchers" / "accelerate").glob("*.yaml"))
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "launchers").glob("*.sh"))]

DRY_RUN = {"SOURCE_TASKS": "mnli qnli", "TARGET_TASK": "superglue-cb", "DRY_RUN": "1"}


def run_local(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launchers/local.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_accelerate_takes_the_yaml(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.distributed_type == "DEEPSPEED"
    # `true` drops DeepSpeed, and every rank trains on all the data
    assert config.use_cpu is False
    written = yaml.safe_load(path.read_text())
    assert config.num_processes == written["num_processes"]
    # beside --deepspeed_config_file accelerate refuses whatever the JSON decides
    assert set(config.deepspeed_config) <= {"zero3_init_flag", "deepspeed_multinode_launcher"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert os.access(path, os.X_OK)


def test_every_variable_of_local_sh_is_explained_at_its_top() -> None:
    text = (ROOT / "launchers" / "local.sh").read_text()
    header, body = text.split("\nset -euo pipefail\n")
    used = set(re.findall(r"\$\{([A-Z_]+):[-?]", body))
    assert used == set(re.findall(r"^#   ([A-Z_]+) ", header, flags=re.MULTILINE))


def test_local_sh_starts_every_source_then_the_target() -> None:
    run = run_local("--seed", "1", **DRY_RUN, NUM_RANKS="4", MODEL="google/flan-t5-xl")
    assert run.returncode == 0, run.stderr
    mnli, qnli, adapt = run.stdout.splitlines()
    for line, stage, task in (
        (mnli, "source", "mnli"),
        (qnli, "source", "qnli"),
        (adapt, "adapt", "superglue-cb"),
    ):
        assert f"-m pemt {stage} --config {stage} --task_name {task} --bank_dir bank" in line
        assert "--deepspeed_config_file ds_configs/zero2.json --num_processes 4" in line
        assert line.strip().endswith("--model_name_or_path google/flan-t5-xl --seed 1")
    assert "--source_tasks" in adapt


def test_local_sh_keeps_the_experts_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "mnli").mkdir()
    (tmp_path / "mnli" / "manifest.json").touch()
    run = run_local(**DRY_RUN, BANK_DIR=str(tmp_path))
    assert "--task_name mnli" not in run.stdout
    assert "--task_name qnli" in run.stdout
    assert "--task_name superglue-cb" in run.stdout


def test_local_sh_says_what_is_missing() -> None:
    variables = {**DRY_RUN, "TARGET_TASK": ""}
    run = run_local(**variables)
    assert run.returncode != 0
    assert "TARGET_TASK: names the target task" in run.stderr


@pytest.mark.launch
@pytest.mark.slow
def test_a_launch_that_hangs_is_killed_with_all_its_ranks(launch, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import time\nprint('rank is up', flush=True)\ntime.sleep(600)\n")
    with pytest.raises(pytest.fail.Exception, match="still ran after") as failure:
        launch(str(script), zero=2, timeout=20)
    assert failure.value.msg.count("rank is up") == 2
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and ranks_of(script):
        time.sleep(0.1)
    assert ranks_of(script) == []


def ranks_of(script: Path) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline", "status"])
    return [
        process
        for process in processes
        if str(script) in (process.info["cmdline"] or ())
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
