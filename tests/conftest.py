"""Fixtures of the whole suite: the real data's folder and launches of several ranks."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ranks

ROOT = Path(__file__).resolve().parent.parent

# The fixtures of a small world that faults are tried in, and of a run that nothing happens to.
pytest_plugins = ["tests.support.faults_world"]

# Nothing here may ask the network, and no rank may take all cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

Launch = Callable[..., "Launched"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """All is imported here, which makes next to no garbage; the collector would look through it again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Launches run one after another on one worker, which begins with them; soaks and big ones only when asked for.

    A file's other tests share a worker, so that what they share is made once; the slow files come first.
    """
    unasked = [name for name in ("soak", "big") if name not in config.option.markexpr]
    left_out = [item for item in items if any(map(item.get_closest_marker, unasked))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def launches(item: pytest.Item) -> bool:
        return item.get_closest_marker("launch") is not None

    for item in items:
        group = "launch" if launches(item) else item.path.stem
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (not launches(item), item.path not in slow))


@pytest.fixture(scope="module", autouse=True)
def _freeze_imports() -> None:
    """A run looks for garbage at its end; among all that is imported that takes half of a small run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and published numbers, which is no part of the project."""
    folder = Path(os.environ.get("PEMT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the real data in {folder} (PEMT_SHARED names another folder)")
    return folder


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A finished launch: its exit status and what all ranks printed, stdout and stderr together."""

    returncode: int
    output: str


@pytest.fixture(scope="session")
def launch() -> Launch:
    """`launch("-m", "pemt", "adapt", ..., zero=2)`: run Python arguments on several CPU ranks."""
    return launch_ranks


def launch_ranks(
    *arguments: str,
    zero: int | Path | None,
    num_processes: int = 2,
    timeout: float = 900,  # the first launch on a machine compiles DeepSpeed's Adam
    environment: dict[str, str] | None = None,
    check: bool = True,
) -> Launched:
    """Run a module on several ranks with DeepSpeed, as `accelerate launch` would, and wait for it.

    Args:
        arguments: `-m module`, and its own arguments.
        zero: a ZeRO stage, for ds_configs/zero<stage>.json, or the path of another DeepSpeed JSON; None: one process
            without a launcher.
        timeout: seconds; after that every process of the launch is killed and the test fails.
        environment: variables on top of this process's; with them accelerate itself starts fresh interpreters.
        check: fail the test where the launch's exit status is not 0.
    """
    command = list(arguments)
    if zero is not None:
        json_path = zero if isinstance(zero, Path) else ROOT / "ds_configs" / f"zero{zero}.json"
        command = [
            *("--config_file", str(ROOT / "launchers" / "accelerate" / "cpu.yaml")),
            *("--deepspeed_config_file", str(json_path)),
            *("--num_processes", str(num_processes)),
            *arguments,
        ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        status = _finish(command, out, timeout, environment)
        output = out.read_text()
    if status is None or (check and status != 0):
        end = f"still ran after {timeout} s" if status is None else f"exited with {status}"
        pytest.fail(f"{' '.join(command)}\n{end}:\n{output}")
    return Launched(returncode=status, output=output)


def _finish(
    command: list[str], out: Path, timeout: float, environment: dict[str, str] | None
) -> int | None:
    """A launch's exit status; None where it was killed after `timeout` seconds."""
    process = start_ranks(command, out, environment or {}, forked=environment is None)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also at Ctrl-C: no rank may outlive the test run
        if process.poll() is None:
            kill_session(process)
            process.wait()


def start_ranks(
    command: list[str], out: Path, environment: dict[str, str], *, forked: bool
) -> subprocess.Popen[bytes] | ranks.Forked:
    """Start `accelerate launch *command`, as the leader of a session.

    Args:
        out: receives what all ranks print.
        environment: variables on top of this process's.
        forked: by the launcher that has imported all, where there is no GPU; otherwise fresh interpreters.
    """
    # A forked process cannot use CUDA once its parent has asked for devices, as importing DeepSpeed does.
    if forked and not Path("/dev/nvidiactl").exists():
        return ranks.Forked(command, out, _variables(environment))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return start_command([*launcher, *command], out, environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def python(
    *arguments: str, cwd: Path = ROOT, check: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, to its end; variables on top of this process's, what it prints is caught."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=check,
    )


def start_command(
    command: list[str], out: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start any command, as the leader of a session; arguments as of `start_ranks`."""
    with out.open("w") as written:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=_variables(environment),
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _variables(environment: dict[str, str]) -> dict[str, str]:
    # DeepSpeed and torch start ninja by name; the venv need not be activated for the tests.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}


def kill_session(process: subprocess.Popen[Any] | ranks.Forked) -> None:
    """Kill a launcher and all ranks below it: torch gives each rank a session of its own."""
    try:
        launcher = psutil.Process(process.pid)
        family = [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
