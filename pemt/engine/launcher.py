"""What the launcher started: its ranks, its DeepSpeed JSON, its end."""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.other import get_free_port
from torch.distributed import ReduceOp, TCPStore

from pemt.config import PemtError, RunConfig, launched_deepspeed_json
from pemt.engine.deepspeed_schema import check_schema
from pemt.engine.precision import bf16_is_native
from pemt.engine.waiting import waiting_of_job
from pemt.engine.watchdog import connected


class EngineError(PemtError):
    """The launcher, accelerate and DeepSpeed do not agree on what this job is."""


def deepspeed_plugin(config: RunConfig) -> tuple[DeepSpeedPlugin | None, Path | None]:
    """accelerate's DeepSpeed plugin from the JSON it was launched with, and that file; None without one."""
    launched = launched_deepspeed_json(config)
    if launched is None:
        return None, None
    filled, path = launched
    check_schema(filled, path)
    return DeepSpeedPlugin(hf_ds_config=filled, zero3_init_flag=False), path


@contextlib.contextmanager
def re_rendezvous() -> Iterator[None]:
    """After `--max_restarts` has restarted the ranks, let them meet within the block where nobody has met before.

    The launcher's store lives on, and torch's static rendezvous, which is accelerate's, would give out
    the addresses of the ranks that are gone.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    launchers = connected(seconds=300)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 keeps the new store
    if os.environ["RANK"] != "0":
        me = uuid4().hex
        launchers.set(f"pemt/asks/{os.environ['RANK']}", me)
        os.environ["MASTER_PORT"] = launchers.get(f"pemt/port/{me}").decode()
        yield
        return
    os.environ["MASTER_PORT"] = str(get_free_port())
    met = threading.Event()
    threading.Thread(target=_answer, args=(launchers, met), daemon=True).start()
    try:
        yield
    finally:
        met.set()


def _answer(launchers: TCPStore, met: threading.Event) -> None:
    """Tell the port to whoever asks for it: not by the restart's number, which machines count each for itself."""
    asking = [f"pemt/asks/{rank}" for rank in range(1, int(os.environ["WORLD_SIZE"]))]
    while not met.wait(0.1):
        for key in asking:
            if launchers.check([key]):
                launchers.set(f"pemt/port/{launchers.get(key).decode()}", os.environ["MASTER_PORT"])


def process_group_kwargs(config: RunConfig) -> dict[str, Any]:
    """What accelerate's state needs to open the process group."""
    if "LOCAL_RANK" not in os.environ:
        return {}
    return {
        # On a machine without GPU accelerate names no backend, and launched ranks never find each other.
        "backend": None if torch.cuda.is_available() else "gloo",
        # DeepSpeed's groups do not mind it. No rank works long while another waits in a collective.
        "timeout": timedelta(seconds=config.ddp_timeout),
    }


@functools.cache
def cpu_group() -> torch.distributed.ProcessGroup | None:
    """All ranks over gloo, for a few numbers between hosts; one for the whole job, None where there is one rank."""
    if not torch.distributed.is_initialized():
        return None
    return torch.distributed.new_group(backend="gloo")


def all_reduce_cpu(values: list[int], op: ReduceOp.RedOpType) -> list[int]:
    """Each value reduced over all ranks, from host to host: no device is waited for (all ranks call)."""
    if (group := cpu_group()) is None:
        return values
    reduced = torch.tensor(values)
    torch.distributed.all_reduce(reduced, op, group=group)
    return reduced.tolist()


@functools.cache
def bf16_is_native_everywhere(device: torch.device) -> bool:
    """Whether every rank's device computes natively in bf16 (all ranks call; they vote once in a job)."""
    (lowest,) = all_reduce_cpu([int(bf16_is_native(device))], ReduceOp.MIN)
    return bool(lowest)


def shut_down() -> None:
    """End the process group, all ranks together: a rank that leaves early may abort the others."""
    if torch.distributed.is_initialized():
        waiting = waiting_of_job()
        waiting.barrier()
        waiting.stop()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# What SLURM, Open MPI and MPICH tell each of the processes that they start together.
STARTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check_world_size(num_processes: int) -> None:
    """Refuse to train N copies of the same run side by side.

    Raises:
        EngineError: WORLD_SIZE, as the launcher set it, is not accelerate's number of processes; or it is
            not set, and SLURM or MPI has started several of us.
    """
    if "WORLD_SIZE" not in os.environ:
        starters = STARTERS if STARTERS[0] in os.environ else ("SLURM_NTASKS", *STARTERS)
        for variable in starters:
            copies = os.environ.get(variable, "1")
            if copies.isdecimal() and int(copies) > 1:
                raise EngineError(
                    f"{variable} is {copies}, but WORLD_SIZE is not set: each process would train alone on all the "
                    "data. Let srun or mpirun start one `accelerate launch --machine_rank ...` a node, as "
                    "launchers/slurm_adapt.sbatch does, or tell each process its RANK as that does with LAUNCHER=srun"
                )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise EngineError(
            f"WORLD_SIZE: the launcher started {launched} ranks, but accelerate sees {num_processes}; every rank "
            "would train alone on all the data. Set `use_cpu: false` and `distributed_type: DEEPSPEED` in the "
            "accelerate config (see launchers/accelerate/)"
        )
