"""The ranks of a job and their collectives; there is no model in it yet."""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather, parse_flag_from_env, reduce
from torch import Tensor
from torch.distributed import ReduceOp

from pemt.config import PemtError, RunConfig
from pemt.engine.exit import before_exit
from pemt.engine.launcher import (
    all_reduce_cpu,
    check_world_size,
    cpu_group,
    process_group_kwargs,
    re_rendezvous,
    shut_down,
)
from pemt.engine.process import memory_in_use
from pemt.engine.signals import ended_while_unmet
from pemt.engine.status_lines import show_status
from pemt.engine.waiting import waiting_of_job

T = TypeVar("T")


class Job:
    """The ranks that the launcher has started; every rank calls every method equally often.

    There is one process group for the whole job, which the first one opens: another is made in no time.

    Args:
        config: `ddp_timeout` is how long a collective may take.

    Raises:
        EngineError: the launcher's WORLD_SIZE differs from accelerate's number of processes.
    """

    def __init__(self, config: RunConfig) -> None:
        with ended_while_unmet(), re_rendezvous(), show_status("opening the process group"):
            state = PartialState(
                cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **process_group_kwargs(config)
            )
        check_world_size(state.num_processes)
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        self.is_main: bool = state.is_main_process
        self.is_local_main: bool = state.is_local_main_process
        self.device: torch.device = state.device
        before_exit(shut_down)
        self._hosts = cpu_group()
        self.waiting = waiting_of_job()
        self.waiting.timeout = config.ddp_timeout

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks along dimension 0; the same shape on every rank."""
        return gather(tensor.contiguous())

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks."""
        return reduce(tensor, reduction="mean")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return reduce(tensor, reduction="sum")

    def memory(self) -> dict[str, float]:
        """GB (1e9 bytes) that the rank with the most has in use, by tag (all ranks call)."""
        used = memory_in_use(self.device)
        rows = self.gather(torch.tensor([list(used.values())], device=self.device))
        return dict(zip(used, rows.amax(dim=0).tolist(), strict=True))

    # Outside of the training loop ranks may come late, by as long as their work takes; they are waited for
    # outside of collectives (waiting.py), and `description` says what for.

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank (all ranks call)."""
        self.waiting.barrier()
        return broadcast_object_list([value])[0]

    def on_rank0(self, function: Callable[[], T], description: str) -> T:
        """What a function gives on rank 0, on every rank; so is an error for the user, which all raise.

        Args:
            description: what it does, for those who wait: "reading the checkpoint".
        """
        outcome: T | PemtError | None = None
        if self.is_main:
            try:
                with self.waiting.status(description):
                    outcome = function()
            except PemtError as error:
                outcome = error
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, PemtError):
            # rank 0 may leave with it, and takes along the store at which others wait
            if self._hosts is not None:
                torch.distributed.barrier(group=self._hosts)
            raise outcome
        return cast("T", outcome)

    @contextlib.contextmanager
    def together(self, description: str) -> Iterator[None]:
        """What every rank does, each as fast as it can; who is done waits for the others (all ranks call)."""
        with self.waiting.status(description):
            yield
        self.barrier()

    def local_first(self, description: str) -> contextlib.AbstractContextManager[None]:
        """One rank a machine runs the block first; the others then find what it built (all ranks call)."""
        return self.waiting.local_first(description)

    def barrier(self) -> None:
        """Wait until every rank is here, outside of collectives."""
        self.waiting.barrier()

    def all_reduce_max(self, value: int) -> int:
        """The highest of all ranks' values; from host to host, so that no device is waited for."""
        return all_reduce_cpu([value], ReduceOp.MAX)[0]

    def totals(self, values: list[int]) -> list[int]:
        """The sums over all ranks, element by element; from host to host, as `all_reduce_max`."""
        return all_reduce_cpu(values, ReduceOp.SUM)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, rank 0's first; small ones, from host to host."""
        values = [value] * self.world_size
        if self._hosts is not None:
            torch.distributed.all_gather_object(values, value, group=self._hosts)
        return values
