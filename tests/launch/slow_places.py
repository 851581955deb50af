"""What two ranks run for test_waiting.py: both stages and parts of the demo, with one rank's work slowed or ended.

    accelerate launch ... -m tests.launch.slow_places FOLDER slow PLACE...
    accelerate launch ... -m tests.launch.slow_places FOLDER dies PLACE

FOLDER has a base model and task files. `slow`: at every PLACE the rank named in PLACES takes a quarter longer than
`ddp_timeout`, once. `dies`: of kill -9. Only the parts with such places are run.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch

from pemt.config import SourceConfig
from pemt.config.schema import ExpertConfig
from pemt.demo import pretraining, run as demo, tasks
from pemt.engine import Engine, shut_down, status_lines
from pemt.engine.exit import run_and_exit
from pemt.engine.watchdog import Watchdog
from pemt.run import session
from pemt.run.train import run_adapt, run_source
from tests.support.tiny import adapt_config, source_config, tiny_task

SOURCE, TARGET = "tiny-a", "tiny-target"
TIMEOUT = 2
# What is slow, where it is looked up, and on which rank.
PLACES = {
    "op": ("pemt.run.build.select.prepare", 0),
    "pre-training": ("pemt.demo.pretraining.write_state", 0),
    "fetching": ("pemt.run.train.fetch_base", 0),
    "examples": ("pemt.data.loading.encode", 0),
    "digest": ("pemt.run.prepare.base_digest", 1),
    "reading": ("pemt.engine.engine.materialize_on_device", 1),
    "scoring": ("pemt.run.evaluate.score", 0),
    "pictures": ("pemt.monitor.monitor.Monitor.log_mixture", 0),
    "writing": ("pemt.run.train.write_predictions", 0),
    "report": ("pemt.demo.run.write_report", 0),
}
IN_DEMO = {"pre-training", "report"}


def hooked(name: str, act: Callable[[], None]) -> None:
    """Have a function act on one rank before it is called for the first time."""
    path, rank = PLACES[name]
    owner_path, attribute = path.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner_path)
    real, called = getattr(owner, attribute), False

    def function(*arguments: Any, **fields: Any) -> Any:
        nonlocal called
        if int(os.environ["RANK"]) == rank and not called:
            called = True
            print(f"at {name}", flush=True)
            act()
        return real(*arguments, **fields)

    setattr(owner, attribute, function)


def die() -> None:
    print(f"died at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def demo_parts(folder: Path) -> None:
    tasks.SIZES.update(source=(40, 8, 8), target=(40, 8, 8))
    pretraining.STEPS, pretraining.STEPS_A_SAVE = 4, 2
    made = demo.Demo(folder / "demo", folder / "cache", 0)
    made.prepare()
    row = demo.Row(
        method="pemt",
        target="stable",
        seed=0,
        accuracy=1.0,
        gate_weights={"diet": 1.0},
        gates={"encoder/0": {"diet": 1.0}, "decoder/0": {"diet": 1.0}},
    )
    rows = [row, demo.Row(**{**vars(row), "method": "adapter"})]
    made.report(rows, {"diet": 1.0})


def stages(config: SourceConfig, folder: Path) -> None:
    run_source(config)
    run_adapt(
        adapt_config(
            *(folder / "base", folder / TARGET, folder / "adapt", folder / "bank", TARGET),
            max_steps=2,
            ddp_timeout=TIMEOUT,
        )
    )


def shorten_timeout(config: SourceConfig) -> None:
    """Have collectives fail after `ddp_timeout`, once all ranks are there: a busy machine starts them far apart."""
    Engine(replace(config, ddp_timeout=600))
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))


def main(folder: Path, what: str, places: list[str]) -> None:
    for task in (SOURCE, TARGET):
        tiny_task(task)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"  # no other test fills it
    status_lines.LINE_SECONDS_IN_FILE = TIMEOUT / 2
    # A busy machine's slow start is a hang to the run's watchdog; that it lets those work who are waited for is
    # shown in test_watchdog.py.
    session.Watchdog = lambda **given: Watchdog(**{**given, "timeout": 60 * TIMEOUT})
    for name in places:
        hooked(name, (lambda: time.sleep(1.25 * TIMEOUT)) if what == "slow" else die)
    config = source_config(
        *(folder / "base", folder / SOURCE, folder / "source", folder / "bank", SOURCE),
        expert=ExpertConfig(rank=2),
        max_steps=2,
        ddp_timeout=TIMEOUT,
    )
    shorten_timeout(config)
    if set(places) - IN_DEMO:
        stages(config, folder)
    if set(places) & IN_DEMO:
        demo_parts(folder)
    shut_down()
    if os.environ["RANK"] == "0":
        print("finished", flush=True)


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
