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
from torch.distributed import run as torchrun

from tests.conftest import kill_session, start_ranks

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "launchers" / "accelerate").glob("*.yaml"))
LAUNCHERS = sorted([*(ROOT / "launchers").glob("*.sh"), *(ROOT / "launchers").glob("*.sbatch")])
SCRIPTS = [
    ROOT / ".ci" / "run",
    *LAUNCHERS,
    *sorted((ROOT / "tests" / "support" / "slurm").iterdir()),
]
ON_TWO = {
    "config_file": ROOT / "launchers" / "accelerate" / "cpu.yaml",
    "deepspeed_config_file": ROOT / "ds_configs" / "zero2.json",
    "num_processes": 2,
}
SOURCED = ("slurm_common.sh", "global_batch.sh")

TASKS = {"SOURCE_TASKS": "mnli qnli", "TARGET_TASK": "superglue-cb"}


def run_local(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_script("local.sh", *arguments, **variables)


def run_script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # they ask `pemt plan batch`
    return subprocess.run(
        ["bash", f"launchers/{name}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
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
def test_who_is_started_and_who_is_sourced(path: Path) -> None:
    """What shellcheck finds in them `make lint` tells, a part of `make test`."""
    assert os.access(path, os.X_OK) == (path.name not in SOURCED)


def explained(path: Path) -> set[str]:
    return set(re.findall(r"^#   ([A-Z_]+) ", path.read_text(), flags=re.MULTILINE))


def used(path: Path) -> set[str]:
    """The variables that have a default, or are required, or count where they are set."""
    found = re.findall(r"\$\{([A-Z_]+):[-?+]", path.read_text().replace("$USER", ""))
    return {name for name in found if "SLURM" not in name and name != "CUDA_VISIBLE_DEVICES"}


COMMON = ROOT / "launchers" / "slurm_common.sh"


@pytest.mark.parametrize(
    "path",
    [path for path in LAUNCHERS if path.name != "global_batch.sh"],
    ids=lambda path: path.name,
)
def test_every_variable_is_explained_at_the_top(path: Path) -> None:
    of_all = explained(COMMON) if path.name.startswith("slurm_") and path != COMMON else set()
    batch = {"GLOBAL_BATCH"} if "global_batch.sh" in path.read_text() else set()
    assert (used(path) | batch) - of_all == explained(path)


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
        batch = 32 if stage == "source" else 8
        assert line.strip().endswith(
            "--model_name_or_path google/flan-t5-xl --seed 1 "
            f"--per_device_train_batch_size {batch} --gradient_accumulation_steps 1"
        )
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
    variables = {**TASKS, "RANKS_PER_NODE": "4", "GPU_OPTION": "--gres=gpu:a100:4"}
    run = run_script("slurm_source.sbatch", "--dry_run", "--seed", "1", **variables)
    assert run.returncode == 0, run.stderr
    queued, *steps = run.stdout.splitlines()
    assert queued.split() == [
        *(
            "sbatch",
            "--ntasks-per-node=1",
            "--cpus-per-task=32",
            "--gres=gpu:a100:4",
            "--array=0-1",
        ),
        *("--export=ALL", "--output=runs/slurm/%x-%A_%a.out", "launchers/slurm_source.sbatch"),
        *("--seed", "1"),
    ]
    for line, task in zip(steps, ("mnli", "qnli"), strict=True):
        assert line.startswith("srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=32 ")
        assert f"-m pemt source --config source --task_name {task} " in line
        # 128 on one GPU in the recipe
        assert line.strip().endswith(
            "--resume_from_checkpoint true --seed 1 "
            "--per_device_train_batch_size 32 --gradient_accumulation_steps 1"
        )
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", **TASKS}
    run = run_script("slurm_source.sbatch", RANKS_PER_NODE="1", **job)
    assert run.returncode != 0
    assert "submit with sbatch --array=0-1" in run.stderr
    run = run_script("slurm_source.sbatch", SLURM_ARRAY_TASK_ID="2", RANKS_PER_NODE="1", **job)
    assert (run.returncode, "SOURCE_TASKS has 2" in run.stderr) == (2, True)
    run = run_script("slurm_source.sbatch", SLURM_ARRAY_TASK_ID="0", **job)
    assert (run.returncode, "SLURM gave this job no GPU" in run.stderr) == (2, True)


@pytest.mark.parametrize("launcher", ["accelerate", "srun"])
def test_slurm_adapt_starts_a_launcher_a_node_or_a_task_a_rank(launcher: str) -> None:
    """With 32 ranks the recipe's batch of 32 is an example each."""
    variables = {"NODES": "4", "LAUNCHER": launcher, "LOG_DIR": "logs", "CPUS_PER_RANK": "6"}
    run = run_script("slurm_adapt.sbatch", "--dry_run", **TASKS, **variables)
    assert run.returncode == 0, run.stderr
    queued, step = run.stdout.splitlines()
    tasks, cores = (8, 6) if launcher == "srun" else (1, 48)
    assert queued.startswith(
        f"sbatch --nodes=4 --ntasks-per-node={tasks} --cpus-per-task={cores} --gpus-per-node=8 "
        "--export=ALL --output=logs/%x-%j.out launchers/slurm_adapt.sbatch"
    )
    words = shlex.split(step)
    assert words[:5] == [
        *("srun", "--nodes=4", f"--ntasks={4 * tasks}", f"--ntasks-per-node={tasks}"),
        f"--cpus-per-task={cores}",
    ]
    assert f"slurm_node.sh {launcher} FIRST_NODE 20000 8 4" in " ".join(words)
    assert "[mnli,qnli]" in words
    assert words[-4:] == [
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"),
    ]
    assert (
        "pemt: global batch 32, the recipe's: 32 ranks on 4 nodes x 1 example x 1 micro-batch = 32"
        in run.stderr
    )


def test_slurm_leaves_ranks_out_or_refuses_with_the_numbers() -> None:
    few = run_script("slurm_adapt.sbatch", "--dry_run", **TASKS, NODES="8")
    assert "pemt: 4 of 8 ranks a node are used: a global batch of 32 does not" in few.stderr
    assert "slurm_node.sh accelerate FIRST_NODE 20000 4 8" in few.stdout.splitlines()[1]
    for variables, arguments, told in (
        (
            {"NODES": "3"},
            (),
            "found 3 nodes x 8 ranks = 24 examples at least, which does not divide",
        ),
        ({"NODES": "2"}, ("--per_device_train_batch_size", "4"), "= 64 examples at least"),
        ({"LAUNCHER": "mpirun"}, (), "LAUNCHER: found mpirun, allowed are accelerate and srun"),
    ):
        run = run_script("slurm_adapt.sbatch", "--dry_run", *arguments, **TASKS, **variables)
        assert (run.returncode, told in run.stderr) == (2, True), run.stderr
        assert "srun" not in run.stdout.splitlines()[1:]
    run = run_script("slurm_adapt.sbatch", **TASKS)
    assert (run.returncode, "sbatch is not on PATH" in run.stderr) == (2, True)


NODE = ("srun", "first", "29500", "4", "2", "none.yaml", "ds_configs/zero2.json")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MORE_NAMES = (
    *("OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "PEMT_STAGE_DIR"),
)


def test_a_task_of_srun_is_told_what_a_launcher_would_tell(tmp_path: Path) -> None:
    """And reads what was fetched from a copy on its node."""
    offline = tmp_path / "offline"
    offline.mkdir()
    task = {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_CPUS_PER_TASK": "3"}
    away = {"HF_DATASETS_CACHE": "/elsewhere", "OMP_NUM_THREADS": ""}
    script = f"import os; print(*(os.environ.get(name) for name in {(*NAMES, *MORE_NAMES)}))"
    staged = {"OFFLINE_DIR": str(offline), "STAGE_DIR": str(tmp_path / "scratch")}
    run = run_script("slurm_node.sh", *NODE, "-c", script, **task, **staged)
    assert (run.returncode, "was not filled by pemt fetch --to" in run.stderr) == (2, True)
    (offline / "pemt-fetched.txt").write_text("base\n")
    for copies in (1, 0):
        run = run_script("slurm_node.sh", *NODE, "-c", script, **task, **staged, **away)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("is copied to") == copies
        (copy,) = (tmp_path / "scratch").glob("pemt-*")
        told = run.stdout.splitlines()[-1]
        assert told == f"6 2 8 4 first 29500 3 {copy} 1 None {tmp_path}/scratch"
    del staged["OFFLINE_DIR"]  # a base and data that are folders may be all there is to copy
    run = run_script("slurm_node.sh", *NODE, "-c", script, **task, **staged, HF_HOME="home")
    assert "home" in run.stdout.split(), run.stderr
    assert run.stdout.split()[-1] == str(tmp_path / "scratch")


def test_torchrun_prints_what_would_start() -> None:
    variables = {"NUM_NODES": "4", "RENDEZVOUS": "node1:29500", "RANKS_PER_NODE": "8"}
    fields = [
        "--config",
        "adapt",
        "--method",
        "adapter",
        "--task_name",
        "rte",
        "--output_dir",
        "new",
    ]
    run = run_script("torchrun.sh", "--dry_run", "adapt", *fields, **variables)
    assert run.returncode == 0, run.stderr
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE=ds_configs/zero2.json" in run.stdout
    assert "torchrun --nnodes 4" in run.stdout
    assert "--nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node1:29500" in run.stdout
    assert "-m pemt adapt --config adapt" in run.stdout
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 1" in run.stdout


GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm_common.sh"])
def test_torch_leaves_a_save_the_time_that_slurm_gives(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds between SIGTERM and SIGKILL; torch's own 30 lose the save behind a long step."""
    (tmp_path / "torchrun").write_text(f"#!/usr/bin/env bash\necho ${GRACE}\n")
    (tmp_path / "torchrun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    lines = {
        "torchrun.sh": "launchers/torchrun.sh evaluate runs/cb",
        "slurm_common.sh": "source launchers/slurm_common.sh; torchrun",
    }
    command = ["bash", "-c", lines[script]]
    for given, expected in (({}, "240"), ({GRACE: "9"}, "9")):
        environment = {**os.environ, "PATH": path, **given}
        out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert out.stdout.splitlines()[-1:] == [expected], out.stderr
        monkeypatch.setenv(GRACE, expected)
        arguments = torchrun.get_args_parser().parse_args(["script.py"])
        config, _, _ = torchrun.config_from_args(arguments)
        assert config.shutdown_timeout == int(expected)
    for name in ("slurm_source.sbatch", "slurm_adapt.sbatch"):
        assert "#SBATCH --signal=B:USR1@300\n" in (ROOT / "launchers" / name).read_text()


@pytest.mark.launch
@pytest.mark.slow
def test_a_launch_that_hangs_is_killed_with_all_its_ranks(launch, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="still ran after 1 s"):
        launch("-c", "import time; time.sleep(600)", zero=None, timeout=1)
    script, out = tmp_path / "hang.py", tmp_path / "out"
    script.write_text("import time\nprint('rank is up', flush=True)\ntime.sleep(600)\n")
    options = [f"--{key}={value}" for key, value in ON_TWO.items()]
    process = start_ranks([*options, str(script)], out, {}, forked=False)
    try:
        deadline = time.monotonic() + 300
        while out.read_text().count("rank is up") < 2:
            assert process.poll() is None, out.read_text()
            assert time.monotonic() < deadline, out.read_text()
            time.sleep(0.05)
        assert len(ranks_of(script)) >= 2, "the launcher and its ranks"
    finally:
        kill_session(process)
        process.wait()
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
