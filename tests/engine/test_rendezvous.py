"""Ranks that a launcher has started anew meet, though their machines have counted different numbers of restarts."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.support.ranks import Forked

PROGRAM = """
import torch.distributed as dist
from pemt.engine.launcher import re_rendezvous
with re_rendezvous():
    dist.init_process_group("gloo")
print(dist.get_world_size(), flush=True)
dist.barrier()
dist.destroy_process_group()
"""
RESTARTS = (2, 1, 3)  # of the machine of each rank


@pytest.mark.xdist_group("launch")  # where ranks are forked
def test_ranks_with_different_counts_of_restarts_meet(tmp_path: Path) -> None:
    launchers = TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False
    )
    launchers.set("pemt/asks/1", "one that is gone")
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launchers.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(len(RESTARTS)),
    }
    ranks = [
        Forked(
            ["-c", PROGRAM],
            tmp_path / f"out-{rank}",
            {**environment, "RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)},
        )
        for rank, restarts in enumerate(RESTARTS)
    ]
    try:
        for rank, process in enumerate(ranks):
            status, out = process.wait(timeout=100), (tmp_path / f"out-{rank}").read_text()
            assert (status, out.splitlines()[-1:]) == (0, [str(len(RESTARTS))]), out
    finally:
        for process in ranks:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
