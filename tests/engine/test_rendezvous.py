"""Ranks that a launcher has started anew meet, though their machines have counted different numbers of restarts."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

from torch.distributed import TCPStore

from tests.conftest import ROOT

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


def test_ranks_with_different_counts_of_restarts_meet() -> None:
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
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, restarts in enumerate(RESTARTS)
    ]
    try:
        for process in ranks:
            out, error = process.communicate(timeout=100)
            assert (process.returncode, out) == (0, f"{len(RESTARTS)}\n"), error
    finally:
        for process in ranks:
            process.kill()
