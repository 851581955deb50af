"""launchers/: files that accelerate takes, scripts without shell traps, launches that end."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "launchers" / "accelerate").glob("*.yaml"))
LAUNCHERS = sorted([*(ROOT / "launchers").glob("*.sh"), *(ROOT / "launchers").glob("*.sbatch")])
SCRIPTS = [
    ROOT / ".ci" / "run",
    *LAUNCHERS,
    *sorted((ROOT / "tests" / "support" / "slurm").iterdir()),
]
SOURCED = ("slurm_common.sh",)

TASKS = {"SOURCE_TASKS": "mnli qnli", "TARGET_TASK": "superglue-cb"}


def run_local(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_script("local.sh", *arguments, **variables)


def run_script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"launchers/{name}", *arguments],
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
    command = [shellcheck, "--external-sources", path]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert os.access(path, os.X_OK) == (path.name not in SOURCED)


@pytest.mark.parametrize(
    "path", [path for path in LAUNCHERS if path.name not in SOURCED], ids=lambda path: path.name
)
def test_every_variable_is_explained_at_the_top(path: Path) -> None:
    text = path.read_text()
    header, body = text.split("\nset -euo pipefail\n")
    used = {name for name in re.findall(r"\$\{([A-Z_]+):[-?]", body) if "SLURM" not in name}
    assert used == set(re.findall(r"^#   ([A-Z_]+) ", header, flags=re.MULTILINE))


def test_local_sh_starts_every_source_then_the_target() -> None:
    run = run_local("--dry_run", "--seed", "1", **TASKS, NUM_RANKS="4", MODEL="google/flan-t5-xl")
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
    run = run_local("--dry_run", **TASKS, BANK_DIR=str(tmp_path))
    assert "--task_name mnli" not in run.stdout
    assert "--task_name qnli" in run.stdout
    assert "--task_name superglue-cb" in run.stdout


def test_local_sh_says_what_is_missing() -> None:
    run = run_local(**{**TASKS, "TARGET_TASK": ""})
    assert run.returncode != 0
    assert "TARGET_TASK: names the target task" in run.stderr


def test_slurm_source_trains_one_task_an_element() -> None:
    run = run_script("slurm_source.sbatch", "--dry_run", "--seed", "1", **TASKS, RANKS_PER_NODE="4")
    assert run.returncode == 0, run.stderr
    for line, task in zip(run.stdout.splitlines(), ("mnli", "qnli"), strict=True):
        assert line.startswith("srun --nodes=1 --ntasks=1 accelerate launch ")
        assert f"--num_processes 4 -m pemt source --config source --task_name {task} " in line
        assert line.strip().endswith("--resume_from_checkpoint true --seed 1")
    run = run_script("slurm_source.sbatch", SLURM_SUBMIT_DIR=str(ROOT), **TASKS)
    assert run.returncode != 0
    assert "submit with sbatch --array=0-1" in run.stderr
    beyond = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "2", **TASKS}
    run = run_script("slurm_source.sbatch", **beyond)
    assert (run.returncode, "SOURCE_TASKS has 2" in run.stderr) == (2, True)


def test_slurm_adapt_starts_one_launch_a_node() -> None:
    variables = {**TASKS, "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8"}
    run = run_script("slurm_adapt.sbatch", "--dry_run", **variables)
    assert run.returncode == 0, run.stderr
    words = shlex.split(run.stdout)
    assert words[:4] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    assert 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' in words
    assert "--num_machines 4 --num_processes 32 --main_process_ip FIRST_NODE" in " ".join(words)
    assert "[mnli,qnli]" in words
    run = run_script("slurm_adapt.sbatch", **TASKS)
    assert run.returncode != 0
    assert "submit this file with sbatch" in run.stderr


def test_torchrun_prints_what_would_start() -> None:
    variables = {"NUM_NODES": "4", "RENDEZVOUS": "node1:29500", "RANKS_PER_NODE": "8"}
    run = run_script("torchrun.sh", "--dry_run", "adapt", "--config", "adapt", **variables)
    assert run.returncode == 0, run.stderr
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE=ds_configs/zero2.json" in run.stdout
    assert "torchrun --nnodes 4" in run.stdout
    assert "--nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:29500" in run.stdout
    assert "-m pemt adapt --config adapt" in run.stdout


GRACE = """
from torch.distributed import run
arguments = run.get_args_parser().parse_args(["script.py"])
config, _, _ = run.config_from_args(arguments)
print(config.shutdown_timeout)
"""


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm_common.sh"])
def test_torch_leaves_a_save_the_time_that_slurm_gives(script: str, tmp_path: Path) -> None:
    """Seconds between SIGTERM and SIGKILL; torch's own 30 lose the save behind a long step."""
    (tmp_path / "torchrun").write_text(f"#!/usr/bin/env bash\nexec {sys.executable} -c '{GRACE}'\n")
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    lines = {
        "torchrun.sh": "launchers/torchrun.sh adapt",
        "slurm_common.sh": "source launchers/slurm_common.sh; torchrun",
    }
    command = ["bash", "-c", lines[script]]
    for given, expected in (({}, "240"), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}, "9")):
        environment = {**os.environ, "PATH": path, **given}
        out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert out.stdout.splitlines()[-1:] == [expected], out.stderr
    for name in ("slurm_source.sbatch", "slurm_adapt.sbatch"):
        assert "#SBATCH --signal=B:USR1@300\n" in (ROOT / "launchers" / name).read_text()


@pytest.mark.launch
@pytest.mark.slow
def test_a_launch_that_hangs_is_killed_with_all_its_ranks(launch, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import time\nprint('rank is up', flush=True)\ntime.sleep(600)\n")
    with pytest.raises(pytest.fail.Exception, match="still ran after") as failure:
        launch(str(script), zero=2, timeout=60, environment={})
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
