"""Ranks forked from a process that has imported everything: torch's launcher, without the seconds of each start.

Where the launcher itself, a variable that is read at import or a fresh interpreter is what is tested, the tests start
`accelerate launch` (tests/conftest.py).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from argparse import Namespace
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
# By name all that a run imports: the packages of pemt and of transformers import their modules when they are used.
PRELOADED = [
    "tests.support.gc_off",
    "pemt.engine.deepspeed_import",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "datasets",
    "evaluate",
    "peft",
    "accelerate.commands.launch",
    "torch._dynamo",
    "scipy.io",
    "transformers.models.auto.modeling_auto",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
    "transformers.generation.utils",
    "tensorboard.plugins.hparams.summary_v2",
    "pemt.run.train",
    "pemt.run.early",
    "pemt.run.predict",
    "pemt.run.evaluate_finished",
    "pemt.sweep.run",
    "pemt.demo.run",
    "pemt.demo.pretraining",
    "pemt.report.page",
    "tests.support.tiny",
]


def deepspeed_json(folder: Path, name: str, **zero_fields: object) -> Path:
    """A copy of ds_configs/NAME.json with other fields of `zero_optimization`.

    Unless they say otherwise ZeRO-3 shards parameters as small as the tests' are; it would keep them whole and show
    nothing.
    """
    content = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    content["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **zero_fields}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


class Forked:
    """A forked launcher, or a program alone, as `subprocess.Popen` would show it.

    Args:
        command: options of accelerate launch, and the program: `-m module` and its arguments; that, or `-c text`, alone
            where there are no options.
        out: receives what all ranks print.
        environment: all variables of the launcher and its ranks.
        err: receives what goes to stderr, where that is not `out` too.
        folder: the working folder, where it is not the tests'.
        stdin: a pipe with a name, from which the program reads.
        namespace: of the network, by its name; as under `ip netns exec`.
    """

    def __init__(
        self,
        command: list[str],
        out: Path,
        environment: dict[str, str],
        *,
        err: Path | None = None,
        folder: Path | None = None,
        stdin: Path = Path(os.devnull),
        namespace: str | None = None,
    ) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, __name__])
        self.args = command
        self._process = context.Process(
            target=_run, args=(command, (out, err or out), folder, stdin, environment, namespace)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not in `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode


def _run(
    command: list[str],
    streams: tuple[Path, Path],
    folder: Path | None,
    stdin: Path,
    environment: dict[str, str],
    namespace: str | None,
) -> None:
    os.setsid()
    if namespace is not None:
        with Path("/var/run/netns", namespace).open() as network:
            assert ctypes.CDLL(None).setns(network.fileno(), 0) == 0
    gc.freeze()  # each run of a test collects garbage at its end, half of its time over all that is imported
    gc.enable()
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o600), number)
    # As an interpreter has them: line by line on a terminal.
    sys.stdin, sys.stdout = stdin.open(), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    if folder is not None:
        os.chdir(folder)
    moved = environment.get("HF_HOME") != os.environ.get("HF_HOME")
    os.environ.clear()
    os.environ.update(environment)
    if moved:  # datasets looks where its cache is when it is imported
        importlib.reload(sys.modules["datasets.config"])
    if command[0] in ("-m", "-c"):
        _program(command[0], command[1], command[2:])
    else:
        _launch(command)


def _launch(command: list[str]) -> None:
    """Be `accelerate launch *command`, but for how a rank comes into being."""
    from accelerate.commands import launch
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    def run_forked(arguments: Namespace) -> None:
        config, *_ = run.config_from_args(arguments)
        launcher = elastic_launch(replace(config, start_method="fork"), _program)
        launcher("-m", arguments.training_script, arguments.training_script_args)

    run.run = run_forked
    launch.launch_command(launch.launch_command_parser().parse_args(command))


def _program(option: str, program: str, arguments: list[str]) -> None:
    """Be `python -m` or `-c program *arguments`; torch's launcher waits for functions to return, so success returns."""
    sys.argv = [program, *arguments]
    status = 0
    try:
        if option == "-c":
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 what the interpreter does with it
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if status:
        os._exit(status)
