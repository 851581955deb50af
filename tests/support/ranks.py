"""Ranks forked from a process that has imported everything: torch's launcher, without the seconds of each start.

Where the launcher itself, a variable that is read at import or a fresh interpreter is what is tested, the tests start
`accelerate launch` (tests/conftest.py).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from argparse import Namespace
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRELOADED = ["pemt.engine.deepspeed_import", "datasets", "accelerate.commands.launch", "pemt.demo"]


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


def start(command: list[str], out: Path) -> BaseProcess:
    """Start what `accelerate launch *command` would; `python *command` where it is the program itself, alone.

    Args:
        command: options of accelerate launch, and the program: `-m module`, and its arguments.
        out: receives what all ranks print.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    process = context.Process(target=_run, args=(command, str(out), dict(os.environ)))
    process.start()
    return process


def _run(command: list[str], out: str, environment: dict[str, str]) -> None:
    os.setsid()
    written = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ.clear()
    os.environ.update(environment)
    if command[0] == "-m":
        _program(command[1], command[2:])
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
        launcher(arguments.training_script, arguments.training_script_args)

    run.run = run_forked
    launch.launch_command(launch.launch_command_parser().parse_args(command))


def _program(module: str, arguments: list[str]) -> None:
    """Be `python -m module *arguments`; torch's launcher waits for functions to return, so success returns."""
    sys.argv = [module, *arguments]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 what the interpreter does with it
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if status:
        os._exit(status)
