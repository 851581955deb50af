"""The SLURM scripts for real: small stand-ins for sbatch, srun and scontrol on PATH, tiny tasks, two "nodes"."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pemt.bank.manifests import entry_names
from pemt.config.parse import parse_config
from pemt.config.schema import SourceConfig
from pemt.run.train import run_source
from tests.conftest import ROOT, free_port, kill_session
from tests.support.forked_python import forked_python
from tests.support.tiny import losses, make_base

pytestmark = [pytest.mark.launch, pytest.mark.slow]
SOURCES = ("cola", "sst2")
TARGET = "mrpc"
FIELDS = {
    "bf16": "false",
    "max_source_length": "24",
    "per_device_train_batch_size": "4",
    "per_device_eval_batch_size": "4",
    "num_train_epochs": "1",
    "logging_steps": "1",
    "seed": "0",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("slurm"))


def make_world(folder: Path) -> Path:
    """A base model, one folder of data that all three tasks can read, and the stand-ins' own folders."""
    make_base(folder / "base")
    (folder / "data").mkdir()
    words = ("the", "box", "is", "red", "and", "a", "lid", "that", "was")
    for split in ("train", "validation", "test"):
        rows = [
            {"sentence1": word, "sentence2": "the lid", "sentence": f"{word} box", "label": i % 2}
            for i, word in enumerate(words)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "fake").mkdir()
    (folder / "python").mkdir()
    # Scripts of modules and conda read variables that are not set.
    (folder / "hook.sh").write_text(
        f'echo "node ${{SLURM_NODEID:-}} $NCCL_SOCKET_IFNAME$NOT_SET" >> {folder}/hooked\n'
    )
    return folder


def fake_slurm(folder: Path) -> dict[str, str]:
    """Variables with which the stand-ins are found, and their folder."""
    places = (ROOT / "tests" / "support" / "slurm", Path(sys.executable).parent, os.environ["PATH"])
    path = ":".join(map(str, places))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "FAKE_SLURM": str(folder)}


def submit(
    world: Path, script: str, *, arguments: tuple[str, ...] = (), **variables: str
) -> tuple[str, str]:
    """`bash launchers/SCRIPT ...`, which submits itself: what sbatch printed, and what the jobs' logs hold.

    With FORKED_PYTHON its `python` is no fresh interpreter.
    """
    environment = {
        **fake_slurm(world / "fake"),
        "MODEL": str(world / "base"),
        "BANK_DIR": str(world / "bank"),
        "OUTPUT_DIR": str(world / "runs"),
        "RANKS_PER_NODE": "1",
        "GPU_OPTION": "none",
        "HOOK": str(world / "hook.sh"),
        "NCCL_SOCKET_IFNAME": "lo",
        **variables,
    }
    fields = [word for key, value in FIELDS.items() for word in (f"--{key}", value)]
    command = ["bash", f"launchers/{script}", *fields, *arguments]
    command += ["--data_dir", str(world / "data")]
    known = set((world / "runs" / "slurm").glob("*"))
    (world / "fake" / "asked").unlink(missing_ok=True)
    (world / "hooked").unlink(missing_ok=True)
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=900)
    except BaseException:
        kill_session(job)
        raise
    logs = sorted(set((world / "runs" / "slurm").glob("*")) - known)
    log = "".join(path.read_text() for path in logs)
    assert job.returncode == 0, output + log
    return output, log


def asked(world: Path) -> list[str]:
    """The options that sbatch and srun were given, in their order."""
    return (world / "fake" / "asked").read_text().splitlines()


def hooked(world: Path) -> list[str]:
    """Where the hook was sourced, and what was passed on to there."""
    return (world / "hooked").read_text().splitlines()


def train(world: Path, source: str) -> None:
    """Stage 1 of one task, in this process."""
    paths = {
        "model_name_or_path": "base",
        "data_dir": "data",
        "bank_dir": "bank",
        "output_dir": f"runs/{source}",
    }
    given = {**FIELDS, "task_name": source, "expert.rank": 2}
    given |= {key: world / path for key, path in paths.items()}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    run_source(parse_config(SourceConfig, words, prog="pemt source"))


@pytest.mark.soak
def test_an_array_fills_a_bank(tmp_path: Path) -> None:
    """Two elements, one source task each, of which the second is there already; in fresh interpreters."""
    world = make_world(tmp_path)
    train(world, SOURCES[1])
    _, log = submit(
        world,
        "slurm_source.sbatch",
        arguments=("--expert.rank", "2"),
        SOURCE_TASKS=" ".join(SOURCES),
        ACCELERATE_YAML="launchers/accelerate/cpu.yaml",
        GLOBAL_BATCH="4",
        CPUS_PER_RANK="3",
    )
    folder = world / "runs" / "slurm"
    assert sorted(path.name for path in folder.iterdir()) == [
        "pemt-source-1000_0.out",
        "pemt-source-1001_1.out",
    ]
    queued, *steps = asked(world)
    assert queued == (
        f"--ntasks-per-node=1 --cpus-per-task=3 --array=0-1 --export=ALL --output={folder}/%x-%A_%a.out"
    )
    assert steps == [
        "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=3 --kill-on-bad-exit=1"
    ]
    assert log.count("global batch 4, as --global_batch_size says: 1 rank on 1 node") == 1
    assert log.count(f"{world}/bank/{SOURCES[1]} is there already") == 1
    assert entry_names(world / "bank") == sorted(SOURCES)


def test_two_nodes_adapt_together_without_a_launcher(world: Path) -> None:
    """One task a rank, offline, from a copy of what was fetched on the "node's" own disk."""
    for source in SOURCES:
        train(world, source)
    (world / "offline").mkdir()
    (world / "offline" / "pemt-fetched.txt").write_text("base: tiny\n")
    with forked_python(world / "python") as variables:
        _, log = submit(
            world,
            "slurm_adapt.sbatch",
            TARGET_TASK=TARGET,
            NODES="2",
            CPUS_PER_RANK="2",
            LAUNCHER="srun",
            GLOBAL_BATCH="8",
            MASTER_PORT=str(free_port()),
            OFFLINE_DIR=str(world / "offline"),
            STAGE_DIR=str(world / "scratch"),
            HF_TOKEN="hf_secret",
            **variables,
        )
    run = world / "runs" / f"adapt-{TARGET}"
    assert "2 rank(s), ZeRO-2" in log
    assert json.loads((run / "all_results.json").read_text())["sources"] == list(SOURCES)
    assert list(losses(run)) == [1, 2]  # nine examples, of which both ranks take four
    queued, step = asked(world)
    assert queued.startswith("--nodes=2 --ntasks-per-node=1 --cpus-per-task=2 --export=ALL")
    assert step == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=2 --kill-on-bad-exit=1 "
        "--distribution=block"
    )
    # by the batch script, and on each node
    assert sorted(hooked(world)) == ["node  lo", "node 0 lo", "node 1 lo"]
    assert "slurm_adapt.sbatch: NCCL_SOCKET_IFNAME=lo" in log
    assert "hf_secret" not in log
    assert "Setting accelerator to CPU" not in log  # DeepSpeed's, of every rank
    (staged,) = (world / "scratch").glob("pemt-????????????")  # neither is one of the other two
    assert log.count(f"is copied to {staged}") == 1
    assert (staged / "datasets").is_dir()  # the examples were made there
    assert not (world / "offline" / "datasets").exists()
    # base and data are folders: copied once a disk, and the run's configuration does not know
    for folder in ("base", "data"):
        (copy,) = (world / "scratch").glob(f"pemt-{folder}-*")
        assert log.count(f"{world / folder} is copied to {copy} (") == 1
    assert f"data_dir: {world / 'data'}\n" in (run / "config.yaml").read_text()
    assert f"model_name_or_path: {world / 'base'}\n" in (run / "config.yaml").read_text()


def test_a_check_without_gpus_looks_at_every_node(world: Path) -> None:
    """In a container, as the hook says; here one that answers itself."""
    container = world / "container.sh"
    container.write_text(
        'echo "in the container: $*" >&2\n[[ $* != *"plan batch"* ]] || echo 1 4 4\n'
    )
    hook = world / "container-hook.sh"
    hook.write_text(f"{(world / 'hook.sh').read_text()}CONTAINER=(bash {container})\n")
    variables = {"TARGET_TASK": TARGET, "NODES": "2", "HOOK": str(hook), "DOCTOR": "--no_launch"}
    _, log = submit(world, "slurm_check.sbatch", GPU_OPTION="--gres=gpu:8", **variables)
    assert "gpu" not in asked(world)[0]
    assert log.count("ready") == 2
    assert log.count("in the container: python -m pemt doctor --no_launch") == 2
    assert (
        log.count(
            f"in the container: python -m pemt fetch adapt --config adapt --task_name {TARGET}"
        )
        == 2
    )
    assert log.count("in the container: python -m pemt plan batch adapt --num_nodes 2") == 1
    assert sorted(hooked(world)) == ["node  lo", "node 0 lo", "node 1 lo"]
    assert list((world / "runs").glob("check-*")) == []


CHILD = """
import json, pathlib, signal, sys, time
folder, told, then = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def stop(*_):
    time.sleep(0.3)  # a checkpoint takes its time
    if told != "nothing":
        (folder / "status.json").write_text(json.dumps({"state": told, "step": 3}))
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
seen = folder / "seen"
times = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (times + 1))
if times == 0:
    time.sleep(60)
sys.exit(then)
"""


@pytest.mark.parametrize(
    ("told", "then", "queued"),
    [
        ("interrupted", 0, True),
        ("interrupted", 7, True),
        ("running", 0, True),  # killed while it saved
        ("nothing", 0, True),  # before it began
        ("failed", 0, False),
    ],
)
def test_an_interrupted_job_is_queued_again_and_a_failed_one_is_not(
    tmp_path: Path, told: str, then: int, queued: bool
) -> None:
    """SIGUSR1 to the batch script alone, as SLURM sends it before the time limit."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "status.json").write_text('{"state": "failed"}')  # of the job before
    os.utime(tmp_path / "status.json", (0, 0))
    script = tmp_path / "work.sbatch"
    script.write_text(
        "set -euo pipefail\nsource launchers/slurm_common.sh\nJOB_NAME=job\n"
        f"run_and_requeue {tmp_path} {sys.executable} {tmp_path}/child.py {tmp_path} {told} {then}\n"
    )
    job = subprocess.Popen(
        ["sbatch", str(script)],
        cwd=ROOT,
        env=fake_slurm(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen, deadline = tmp_path / "seen", time.monotonic() + 30
    while not (seen.exists() and seen.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid.1000").read_text()), signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert output.count("back into the queue") == queued, output
    assert seen.read_text() == ("xx" if queued else "x")
    assert job.returncode == (then if queued else 1), output
