"""t5-3b and flan-t5-xl at full size: the command as people give it, on two ranks under ZeRO-3. `make big`.

2.9 billion parameters in bf16, randomly drawn, on CPUs. 6 GB of disk, at most 20 GB of memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pemt.plan import Cluster, Job, read_zero
from pemt.plan.count import sizes, weights
from pemt.plan.job import CHIPS
from pemt.plan.memory import memory
from tests.conftest import ROOT, launch_ranks
from tests.launch.full_size import job_of
from tests.support.tiny import losses

pytestmark = [pytest.mark.launch, pytest.mark.big]
LIMIT = 20e9
# Without these the C library keeps what was freed, and the peak shows its thrift, not ours.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MACHINE = Cluster(nodes=1, gpus_per_node=2, chip=CHIPS["a10-24"], backend="gloo")
STEPS = 4


class Ranks(threading.Thread):
    """Looks at the ranks below this process twice a second: the most each held resident, and read from disk."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[int, int] = {}
        self.read: dict[int, int] = {}
        self._over = threading.Event()

    def __enter__(self) -> Ranks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    rank = process.environ().get("RANK")
                    if rank is not None:
                        self._look(process, int(rank))
                except (psutil.Error, OSError, ValueError):
                    continue  # it has just ended

    def _look(self, process: psutil.Process, rank: int) -> None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        self.peak[rank] = max(self.peak.get(rank, 0), int(peak.split()[1]) * 1024)
        self.read[rank] = max(self.read.get(rank, 0), process.io_counters().read_bytes)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run and one that went on from its second step."""

    job: Job
    whole: Path
    resumed: Path
    peak: list[int]
    read: int
    files: int


@pytest.fixture(scope="module", params=["flan-t5-xl", "t5-3b"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp(request.param)
    try:
        yield train(request.param, folder)
    finally:
        shutil.rmtree(folder)


def train(name: str, folder: Path) -> Run:
    told(f"building {name}")
    program = [sys.executable, "-m", "tests.launch.full_size", name, str(folder)]
    subprocess.run(program, cwd=ROOT, check=True)
    files = cool(folder)
    told(f"{files / 1e9:.2f} GB of files; a run")
    with Ranks() as ranks:
        adapt(folder, "whole")
    told("resuming")
    adapt(folder, "resumed", "--resume_from_checkpoint", str(folder / "whole" / "checkpoint-2"))
    told("done")
    return Run(
        job=job_of(name),
        whole=folder / "whole",
        resumed=folder / "resumed",
        peak=[ranks.peak[rank] for rank in (0, 1)],
        read=sum(ranks.read.values()),
        files=files,
    )


def adapt(folder: Path, name: str, *arguments: str) -> None:
    finished = launch_ranks(
        *("-m", "pemt", "adapt", "--model_name_or_path", str(folder / "base")),
        *("--bank_dir", str(folder / "bank"), "--output_dir", str(folder / name)),
        *("--task_name", "full-size", "--task_file", str(folder / "task.yaml")),
        *("--data_dir", str(folder / "data"), "--per_device_train_batch_size", "1"),
        *("--max_steps", str(STEPS), "--save_steps", "2", "--save_total_limit", "9"),
        *("--logging_steps", "1", "--eval_strategy", "no", "--max_eval_samples", "2"),
        *("--per_device_eval_batch_size", "1", *arguments),
        zero=3,
        timeout=3600,
        environment=MALLOC,
    )
    told(finished.output)


def cool(folder: Path) -> int:
    """Have the page cache forget a folder's files; their bytes."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            size += path.stat().st_size
    return size


def told(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def interpreter() -> int:
    """Resident bytes of a process that has imported everything and holds nothing."""
    program = "import pemt.run.train, psutil; print(psutil.Process().memory_info().rss)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(found.stdout.split()[-1])


def test_it_trains(run: Run) -> None:
    found = losses(run.whole)
    assert list(found) == [1, 2, 3, 4]
    assert all(0 < loss < 50 for loss in found.values())
    assert len(set(found.values())) == STEPS


def test_it_goes_on_with_the_same_bits(run: Run) -> None:
    whole = losses(run.whole)
    assert losses(run.resumed) == {step: whole[step] for step in (3, 4)}


def test_a_checkpoint_holds_the_trained_alone(run: Run) -> None:
    for folder in (run.whole / "checkpoint-2", run.resumed / "checkpoint-4"):
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder.name}: {size / 1e6:.1f} MB")
        assert size == pytest.approx(12 * sizes(weights(run.job))["trained"], rel=0.05)


def test_memory_is_as_planned(run: Run) -> None:
    zero = read_zero(ROOT / "ds_configs" / "zero3.json")
    planned, libraries = memory(run.job, zero, MACHINE), interpreter()
    print(f"{planned}\nlibraries {libraries / 1e9:.2f}, peaks {[each / 1e9 for each in run.peak]}")
    assert sum(run.peak) < LIMIT
    for peak in run.peak:
        assert peak == pytest.approx(planned.total + libraries, rel=0.15)


def test_the_node_reads_every_file_once(run: Run) -> None:
    print(f"read {run.read / 1e9:.2f} GB of {run.files / 1e9:.2f} GB")
    assert 0.9 * run.files < run.read < 1.1 * run.files
