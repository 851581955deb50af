"""The planner against real runs, on one machine and on two: network namespaces joined by a cable of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from pemt.plan import Cluster, Job, Zero, read_zero
from pemt.plan.count import weights
from pemt.plan.job import CHIPS
from pemt.plan.memory import gradient_bytes, memory, optimizer_bytes
from pemt.plan.traffic import at_start, per_step
from tests.conftest import ROOT, kill_session, launch_ranks
from tests.launch.launched_plan import JOBS, LARGE, STEPS, make_world
from tests.support.ranks import Forked, deepspeed_json
from tests.support.tiny import losses

pytestmark = [pytest.mark.launch, pytest.mark.slow]
soak = pytest.mark.soak  # formulas; two nodes that train together: test_slurm.py
STAGES = (3, 0, 1, 2)
ALONE = (2, 3)  # on one machine too
TRACED = 2  # after so many steps DeepSpeed knows the order of the modules
# Without these the C library keeps what was freed, and the peak shows its thrift, not ours.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
PAIR = Cluster(nodes=2, gpus_per_node=1, chip=CHIPS["a10-24"], backend="gloo")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("plan"))
    for stage in range(4):
        # so that some weights stay whole, and some are gathered
        deepspeed_json(folder, f"zero{stage}", stage3_param_persistence_threshold=10_000)
    return folder


@pytest.fixture(scope="module", params=STAGES)
def zero(world: Path, request: pytest.FixtureRequest) -> Zero:
    return read_zero(world / f"zero{request.param}.json")


@pytest.fixture(scope="module")
def alone(world: Path) -> Callable[[int], Path]:
    """By stage: the folder of a run of two ranks on one machine."""

    @cache
    def run(stage: int) -> Path:
        return launched(world, stage, "alone", "fp32")

    return run


@pytest.fixture(scope="module")
def large(world: Path) -> Callable[[int], Path]:
    """The same with a larger model, in fresh interpreters."""

    @cache
    def run(stage: int) -> Path:
        return launched(world, stage, "large", *JOBS, "large", environment=MALLOC)

    return run


def launched(world: Path, stage: int, name: str, *trainings: str, **options: Any) -> Path:
    folder = world / f"{name}-{stage}"
    folder.mkdir()
    program = ("-m", "tests.launch.launched_plan", str(world), str(folder), *trainings)
    launch_ranks(*program, zero=world / f"zero{stage}.json", **options)
    return folder


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@soak
@pytest.mark.parametrize("stage", ALONE)
def test_gradients_and_optimizer_to_the_byte(
    large: Callable[[int], Path], world: Path, stage: int
) -> None:
    assert_bytes(large(stage), read_zero(world / f"zero{stage}.json"), {**JOBS, "large": LARGE})


def assert_bytes(folder: Path, zero: Zero, jobs: dict[str, Job]) -> None:
    for rank, report in enumerate(reports(folder)):
        for name, job in jobs.items():
            found = weights(job)
            assert set(report[name]["gradients"]) == {gradient_bytes(found, zero, job, 2, rank)}
            assert set(report[name]["optimizer"]) == {optimizer_bytes(found, zero, job, 2)}


@soak
@pytest.mark.parametrize("stage", ALONE)
def test_peak_memory(large: Callable[[int], Path], world: Path, stage: int) -> None:
    """In one process: tests/plan/test_real_step.py."""
    zero = read_zero(world / f"zero{stage}.json")
    planned = memory(LARGE, zero, replace(PAIR, nodes=1, gpus_per_node=2)).total
    for report in reports(large(stage)):
        assert report["large"]["peak"] == pytest.approx(planned, rel=0.15)


@pytest.fixture(scope="module")
def apart(world: Path, zero: Zero) -> Path:
    """The same small runs, a rank on each of two machines."""
    folder = world / f"apart-{zero.stage}"
    folder.mkdir()
    with two_machines() as (names, cables):
        started = [
            start(world, folder, zero, machine=names[rank], cable=cables[rank], rank=rank)
            for rank in (0, 1)
        ]
        try:
            ended = [process.wait(timeout=600) for process in started]
        finally:
            for process in started:
                kill_session(process)
    outputs = [(folder / f"out-{rank}").read_text() for rank in (0, 1)]
    assert ended == [0, 0], "\n".join(outputs)[-6000:]
    return folder


@soak
def test_two_machines_train_as_one(apart: Path, zero: Zero, alone: Callable[[int], Path]) -> None:
    ours = losses(apart / "fp32")
    assert len(ours) == STEPS
    assert len(set(ours.values())) == STEPS
    one_machine = alone(max(zero.stage, min(ALONE)))  # stages 0 to 2 train alike
    # Stages round differently, and every step adds to it.
    assert ours == pytest.approx(losses(one_machine / "fp32"), rel=1e-5)


@soak
def test_gradients_and_optimizer_of_a_machine_to_the_byte(apart: Path, zero: Zero) -> None:
    assert_bytes(apart, zero, JOBS)


@soak
@pytest.mark.parametrize("precision", JOBS)
def test_bytes_on_the_wire(apart: Path, zero: Zero, precision: str) -> None:
    planned = sum(each.sent("gloo") for each in per_step(JOBS[precision], zero, PAIR))
    measured = []
    for report in reports(apart):
        counted = report[precision]["wire"]
        for way in (0, 1):
            after = [step[way] for step in counted[TRACED:]]
            # The median: a single step has been seen with a tenth more, alike on both machines.
            measured.append(median(b - a for a, b in pairwise(after)))
    tell(zero, precision, "in a step", planned, measured)
    assert measured == pytest.approx([planned] * len(measured), rel=0.10)
    assert min(measured) > planned, "headers come on top"


@soak
@pytest.mark.parametrize("precision", JOBS)
def test_bytes_at_the_start(apart: Path, zero: Zero, precision: str) -> None:
    """From the first machine to the second: a broadcast has one direction."""
    planned = sum(each.sent("gloo") for each in at_start(JOBS[precision], zero, PAIR))
    first, second = (report[precision]["start"] for report in reports(apart))
    tell(zero, precision, "at the start", planned, [first[0], second[1]])
    assert [first[0], second[1]] == pytest.approx([planned] * 2, rel=0.10)


def tell(zero: Zero, precision: str, when: str, planned: float, measured: list[int]) -> None:
    """A line, which `pytest -rP` shows."""
    print(
        f"ZeRO-{zero.stage} {precision} {when}: planned {planned:,.0f} B, measured {min(measured):,} to"
        f" {max(measured):,} B, {max(measured) / planned:.4f} of the plan at most"
    )


def start(world: Path, folder: Path, zero: Zero, *, machine: str, cable: str, rank: int) -> Forked:
    """`accelerate launch` on one machine, as launchers/accelerate/many_nodes.yaml says."""
    command = [
        *("--config_file", str(ROOT / "launchers" / "accelerate" / "many_nodes.yaml")),
        *("--deepspeed_config_file", str(world / zero.name)),
        *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
        *("--main_process_ip", "10.77.0.1", "--main_process_port", "29500"),
        *("-m", "tests.launch.launched_plan", str(world), str(folder), *JOBS),
    ]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path, "GLOO_SOCKET_IFNAME": cable, "PEMT_INTERFACE": cable}
    return Forked(command, folder / f"out-{rank}", environment, namespace=machine)


@contextmanager
def two_machines() -> Iterator[tuple[list[str], list[str]]]:
    """Names of two network namespaces and of the interfaces that join them.

    Skips the test where none may be made.
    """
    if shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2) to make network namespaces")
    names = [f"pemt-{os.getpid()}-{rank}" for rank in (0, 1)]
    cables = [f"pemt{os.getpid() % 100_000}v{rank}" for rank in (0, 1)]
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    try:
        for name in names:
            run(["ip", "netns", "add", name])
        far_end = ["peer", "name", cables[1], "netns", names[1]]
        run(["ip", "link", "add", cables[0], "netns", names[0], "type", "veth", *far_end])
        for rank, (name, cable) in enumerate(zip(names, cables, strict=True)):
            run(["ip", "-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", cable])
            run(["ip", "-n", name, "link", "set", cable, "up"])
            run(["ip", "-n", name, "link", "set", "lo", "up"])
    except subprocess.CalledProcessError as error:
        remove(names)
        pytest.skip(f"network namespaces may not be made here: {error.stderr.strip()}")
    try:
        yield names, cables
    finally:
        remove(names)


def remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_peak_memory_of_a_gpu(world: Path) -> None:
    folder = world / "gpu"
    folder.mkdir()
    program = ("-m", "tests.launch.launched_plan", str(world), str(folder), *JOBS, "large")
    launch_ranks(*program, zero=2, num_processes=1)
    one = Cluster(nodes=1, gpus_per_node=1, chip=CHIPS["h100-80"])
    planned = memory(LARGE, read_zero(ROOT / "ds_configs" / "zero2.json"), one).total
    measured = json.loads((folder / "rank0.json").read_text())["large"]["peak"]
    assert measured == pytest.approx(planned, rel=0.10)
