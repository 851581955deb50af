"""A bare process under the watchdog, for test_watchdog.py: it comes by every 50 ms until a line tells it what to do.

python -m tests.engine.watched RANK RANKS TIMEOUT HOST
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time

from pemt.engine.watchdog import Watchdog


def main(rank: int, ranks: int, timeout: float, host: str) -> None:
    socket.gethostname = lambda: host
    watchdog = Watchdog(
        rank=rank,
        world_size=ranks,
        timeout=timeout,
        on_failure=lambda: print("ended", flush=True),
    )

    def barrier() -> None:
        watchdog._store.set(f"here/{rank}", "")
        watchdog._store.wait([f"here/{each}" for each in range(ranks)])

    watchdog.start("run", barrier)
    print("started", flush=True)
    step = 0
    while not told(0.05):
        step += 1
        watchdog.heartbeat(step)
    line = sys.stdin.readline()
    if line == "wait\n":
        while not told(0.05):
            watchdog.heartbeat_while_waiting()
    if line in ("wait\n", "work\n"):
        line = sys.stdin.readline()
    if line == "leave\n":
        watchdog.stop(together=True)
        time.sleep(1)
        os._exit(0)
    time.sleep(60)


def told(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
