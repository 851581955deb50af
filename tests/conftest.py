"""Fixtures of the whole suite: the real data's folder and launches of several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent

# The fixtures of a small world that faults are tried in, and of a run that nothing happens to.
pytest_plugins = ["tests.support.faults_world"]

# Nothing here may ask the network, and no rank may take all cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

Launch = Callable[..., "Launched"]


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Launches run one after another on one worker, which begins with them; soaks and big ones only when asked for."""
    unasked = [name for name in ("soak", "big") if name not in config.option.markexpr]
    left_out = [item for item in items if any(map(item.get_closest_marker, unasked))]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        if item.get_closest_marker("launch"):
            item.add_marker(pytest.mark.xdist_group("launch"))
    items.sort(key=lambda item: item.get_closest_marker("launch") is None)


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
    zero: int | Path,
    num_processes: int = 2,
    timeout: float = 900,  # the first launch on a machine compiles DeepSpeed's Adam
    environment: dict[str, str] | None = None,
    check: bool = True,
) -> Launched:
    """Start `accelerate launch` with DeepSpeed and wait for it.

    Args:
        arguments: what stands after `python`: a script or `-m module`, and its own arguments.
        zero: a ZeRO stage, for ds_configs/zero<stage>.json, or the path of another DeepSpeed JSON.
        timeout: seconds; after that every process of the launch is killed and the test fails.
        environment: variables on top of this process's.
        check: fail the test where the launch's exit status is not 0.
    """
    deepspeed_json = zero if isinstance(zero, Path) else ROOT / "ds_configs" / f"zero{zero}.json"
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "launchers" / "accelerate" / "cpu.yaml")),
        *("--deepspeed_config_file", str(deepspeed_json)),
        *("--num_processes", str(num_processes)),
        *arguments,
    ]
    # DeepSpeed and torch start ninja by name; the venv need not be activated for the tests.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_session(process)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(command)}\nstill ran after {timeout} s:\n{output}")
    except BaseException:  # Ctrl-C: no rank may outlive the test run
        kill_session(process)
        raise
    if check and process.returncode != 0:
        pytest.fail(f"{' '.join(command)}\nexited with {process.returncode}:\n{output}")
    return Launched(returncode=process.returncode, output=output)


def kill_session(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and all ranks below it: torch gives each rank a session of its own."""
    try:
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
