"""From command to first step: the published script beside `pemt adapt`, each seen by the loss that it logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.beside.measure import Row
from tests.beside.process import BesideError, environment
from tests.beside.recipe import TARGET, published_arguments, settings_of

TIMEOUT = 180.0  # seconds
POLL = 0.01


def measure_start(
    name: str, world: Path, *, checkout: Path, python: str, threads: int, rounds: int
) -> Row:
    """One row; each command is started once before, so that caches of data and imports are warm on both sides."""
    variables = environment(world, threads)
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for number in range(-1, rounds):
        output = world / f"start{number}"
        script = [python, "run_seq2seq.py", *published_arguments("stage2", world, output)]
        log, ours = world / "start.log", output / "ours"
        # transformers' Trainer prints what it logs; `pemt adapt` writes log.jsonl as well.
        printed, logged = (log, "{'loss': "), (ours / "log.jsonl", '"train/loss"')
        taken = {
            "theirs": first_step(script, checkout / "pemt", log, printed, variables),
            "ours": first_step(our_command(world, ours), world, log, logged, variables),
        }
        for side, each in taken.items():
            if number >= 0:
                seconds[side].append(each)
    note = f"{threads} threads, {rounds} starts each"
    return Row(name=f"{name}: command to first step", unit="s", **seconds, note=note)


def our_command(world: Path, output_dir: Path) -> list[str]:
    """Stage 2 as the published script's arguments have it."""
    settings = settings_of(world)
    options = {
        "config": "adapt",
        "task_name": TARGET,
        "model_name_or_path": world / "base",
        "bank_dir": world / "bank",
        "data_dir": world / "data",
        "output_dir": output_dir,
        "per_device_train_batch_size": settings["batch"],
        "per_device_eval_batch_size": settings["batch"],
        "max_source_length": settings["source"],
        "max_target_length": settings["target"],
        "num_train_epochs": 1,
        "logging_steps": 1,
        "bf16": "false",
        "report_to": "[]",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "pemt", "adapt", *words]


def first_step(
    command: list[str], folder: Path, log: Path, sign: tuple[Path, str], variables: dict[str, str]
) -> float:
    """Seconds until a training loss is seen; then the command is ended.

    Args:
        folder: where it is started; log: what it prints.
        sign: a file, and what stands in it once there is a loss.
        variables: its environment.

    Raises:
        BesideError: it ends before, or takes longer than `TIMEOUT` seconds.
    """
    began = time.perf_counter()
    with log.open("w") as printed:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while True:
            over = process.poll() is not None or time.perf_counter() - began > TIMEOUT
            if _is_there(*sign):
                return time.perf_counter() - began
            if over:
                last = (log.read_text().splitlines() or ["nothing printed"])[-1]
                raise BesideError(f"{' '.join(command[:4])} ...: no first step: {last}")
            time.sleep(POLL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_there(file: Path, text: str) -> bool:
    """Whether a file is there and holds a text."""
    return file.is_file() and text in file.read_text(errors="replace")
