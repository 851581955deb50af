"""What two ranks run in one launch, for test_two_ranks.py.

    accelerate launch ... -m tests.launch.two_ranks FOLDER

FOLDER is that of a World; the runs go into it.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pemt.config.schema import AdaptConfig
from pemt.data import DataError
from pemt.engine import shut_down
from pemt.engine.exit import run_and_exit
from pemt.engine.signals import Interrupted
from pemt.run.train import run_adapt
from tests.support.jobs import World
from tests.support.stopped import stopped_at_every_step, stopped_once

# Three steps: on two ranks each takes two micro-batches of four a step, on one rank four.
FIELDS = {"num_train_epochs": "1", "gradient_accumulation_steps": "2"}


def config_of(world: World, run: str, **fields: object) -> AdaptConfig:
    return world.config(run, **{**FIELDS, **fields})


def without_dropout(world: World, run: str, **fields: object) -> AdaptConfig:
    """Ranks draw dropout of their own, so runs on different numbers of ranks must have none."""
    return config_of(world, run, model_name_or_path=world.folder / "without-dropout", **fields)


def stopped_after(config: AdaptConfig, stops: int) -> None:
    """Take as many steps, one at a time."""
    for _ in range(stops):
        try:
            with stopped_once([]):
                run_adapt(config)
        except Interrupted:
            continue
        raise AssertionError("it was not stopped")


class StopsOnOne(TrainerCallback):
    """Rank 1 alone wants the run to stop."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2 and os.environ["RANK"] == "1"


def from_memory(world: World) -> str:
    """A run over rows in memory; and what ranks are told that were given different ones."""
    rows = {
        split: [json.loads(line) for line in (world.folder / "data" / f"{split}.jsonl").open()]
        for split in ("train", "validation", "test")
    }
    config = replace(config_of(world, "memory"), data_dir=None)
    run_adapt(config, **rows, callbacks=[StopsOnOne()])
    fewer = rows["train"][int(os.environ["RANK"]) :]
    other = replace(config, output_dir=str(world.folder / "other"))
    try:
        run_adapt(other, **{**rows, "train": fewer})
    except DataError as error:
        return str(error)
    return "nothing"


def main(world: World) -> None:
    run_adapt(config_of(world, "whole"))
    run_adapt(config_of(world, "again"))
    stops = stopped_at_every_step(config_of(world, "stopped"))
    run_adapt(without_dropout(world, "plain"))
    stopped_after(without_dropout(world, "from-two"), 2)
    run_adapt(without_dropout(world, "from-one", gradient_accumulation_steps="4"))
    told = from_memory(world)
    if os.environ["RANK"] == "0":
        (world.folder / "stops.json").write_text(json.dumps(stops))
        (world.folder / "told").write_text(told)
    shut_down()


if __name__ == "__main__":
    run_and_exit(lambda: main(World(folder=Path(sys.argv[1]))))
