"""A real job of two ranks behind `accelerate launch`, small enough to be killed many times."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file
from torch import Tensor

from pemt.config import AdaptConfig
from pemt.config.parse import parse_config
from tests.conftest import ROOT, kill_session, start_ranks
from tests.support.tiny import make_base, write_task_files

TASK_FILE = """
name: colours
description: says whether the box is red
template: "text : {text}"
labels: ["no", "yes"]
metrics: [accuracy]
max_target_length: 4
"""
FIELDS = {
    "method": "adapter",
    "task_name": "colours",
    "bf16": "false",
    "per_device_train_batch_size": "4",
    "per_device_eval_batch_size": "4",
    "max_eval_samples": "4",
    "max_source_length": "24",
    "learning_rate": "0.01",
    "num_train_epochs": "6",  # of five steps on two ranks
    "logging_steps": "1",
    "report_to": "[]",
    "seed": "0",
}


@dataclass(frozen=True, kw_only=True)
class World:
    """A base model, a task and its data; runs go into its folder."""

    folder: Path

    @staticmethod
    def make(folder: Path) -> World:
        make_base(folder / "base", num_layers=1)
        shutil.copytree(folder / "base", folder / "without-dropout")
        # With dropout every rank's generators must be in place again.
        config = folder / "base" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dropout_rate": 0.1}))
        write_task_files(folder / "data", seed=0)
        (folder / "task.yaml").write_text(TASK_FILE)
        return World(folder=folder)

    def config(self, run: str | Path, **fields: object) -> AdaptConfig:
        """Of a run as by `arguments`."""
        return parse_config(AdaptConfig, self.arguments(run, **fields)[1:], prog="pemt adapt")

    def arguments(self, run: str | Path, **fields: object) -> list[str]:
        """What stands behind `pemt` for a run into the folder of this name, or into another one."""
        given = {
            **FIELDS,
            "model_name_or_path": self.folder / "base",
            "data_dir": self.folder / "data",
            "task_file": self.folder / "task.yaml",
            "output_dir": self.folder / run,
            **fields,
        }
        return [
            "adapt",
            *(word for key, value in given.items() for word in (f"--{key}", str(value))),
        ]

    def start(
        self,
        run: str,
        *,
        ranks: int = 2,
        zero: int = 2,
        program: tuple[str, ...] = ("-m", "pemt"),
        launcher: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        forked: bool = True,
        **fields: object,
    ) -> Job:
        """Start a run behind accelerate launch.

        Args:
            program: stands before pemt's own arguments.
            launcher: more options of accelerate launch.
            environment: variables on top of this process's.
            forked: not in fresh interpreters, which take ten seconds to import everything.
        """
        command = [
            *("--config_file", str(ROOT / "launchers" / "accelerate" / "cpu.yaml")),
            *("--deepspeed_config_file", str(ROOT / "ds_configs" / f"zero{zero}.json")),
            *("--num_processes", str(ranks)),
            *launcher,
            *program,
            *self.arguments(run, **fields),
        ]
        start = partial(start_ranks, forked=forked)
        return Job(command, self.folder / run, environment or {}, start=start)


class Job:
    """A launcher and its ranks, under way."""

    def __init__(
        self,
        command: list[str],
        run: Path,
        environment: dict[str, str],
        *,
        start: Callable[..., Any],
    ) -> None:
        self.run = run
        self._log = run.with_name(f"{run.name}-{time.monotonic_ns()}.out")
        self._log.touch()
        self.process = start(command, self._log, environment)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, rank 0 first."""
        started = psutil.Process(self.process.pid).children()
        return sorted(started, key=lambda rank: rank.pid)  # they are started in this order

    def until(self, condition: Callable[[], object], *, timeout: float = 400) -> None:
        """Wait for something to happen while the job runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the job ended by itself:\n{self.output}"
            assert time.monotonic() < deadline, f"it did not happen in {timeout} s:\n{self.output}"
            time.sleep(0.005)

    def until_step(self, step: int) -> None:
        self.until(lambda: last_step(self.run) >= step)

    def end(self, *, timeout: float = 400) -> int:
        """Wait for the launcher; its exit status. No rank may be left."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still ran after {timeout} s:\n{self.output}") from None
        return status

    def finish(self) -> Job:
        """Wait for a job that must end well."""
        assert self.end() == 0, self.output
        return self

    def kill(self) -> None:
        """kill -9 of the launcher and every rank at once."""
        for rank in self.ranks():
            rank.send_signal(signal.SIGSTOP)  # so that none acts on the death of another
        kill_session(self.process)
        self.process.wait()


@contextmanager
def clean(job: Job) -> Iterator[Job]:
    """Whatever a test finds, no process of its job stays."""
    try:
        yield job
    finally:
        if job.process.poll() is None:
            kill_session(job.process)
            job.process.wait()


def last_step(run: Path) -> int:
    """The last step in log.jsonl; 0 before the first."""
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def final_state(run: Path) -> dict[str, Tensor]:
    """Weights and moments of a run's newest checkpoint."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {
        **load_file(newest / "trained.safetensors"),
        **load_file(newest / "moments.safetensors"),
    }


def assert_same_end(run: Path, reference: Path) -> None:
    """Two runs ended with the same bits: weights, moments, logged losses, results."""
    ours, theirs = final_state(run), final_state(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    assert logged(run) == logged(reference)
    ours_told, theirs_told = results(run), results(reference)
    for name in ("test_accuracy", "test_loss", "best_checkpoint", "epoch"):
        assert ours_told[name] == theirs_told[name]


def logged(run: Path) -> list[tuple[int, float | None, float | None]]:
    """Step, training loss and validation loss of every line."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(line["step"], line.get("train/loss"), line.get("eval/colours/loss")) for line in lines]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "all_results.json").read_text())
