"""What every launched rank runs: baselines from start to end, some again from the middle; a sweep.

    accelerate launch ... -m tests.launch.launched_methods WORLD FOLDER

WORLD holds the base model and the task's files. Runs go to FOLDER; the sweep is the one that lies there, if any.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from pemt.engine import shut_down
from pemt.engine.exit import run_and_exit
from pemt.run.train import run_adapt
from pemt.sweep.plan import Run, read_sweep
from pemt.sweep.run import run_sweep
from tests.support.tiny import adapt_config, tiny_task

TASK = "tiny-methods"
SWEEP = "sweep.yaml"
RESUMED_STEP = 3
# What is run where, and what of it from the middle too: in one process all, as what the others are held against; under
# ZeRO-3 as well, where each trains parameters of another kind, `bitfit` and `lora` in a sweep.
RUN: dict[str, tuple[str, ...]] = {
    "plain": ("full", "full-bf16", "bitfit", "lora", "prompt", "ia3"),
    "zero2": ("full", "full-bf16"),
    "zero3": ("full", "full-bf16", "prompt", "ia3"),
}
RESUMED = {"plain": (), "zero2": ("full-bf16",), "zero3": ("full-bf16", "prompt")}
# name of the run -> what makes it
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full-bf16": {"method": "full", "bf16": True},
    "bitfit": {"method": "bitfit"},
    "lora": {"method": "lora", "peft_config": {"r": 3}},
    "prompt": {"method": "prompt", "peft_config": {"num_virtual_tokens": 5}},
    "ia3": {"method": "peft", "peft_config": {"peft_type": "IA3"}},
}


SHARED = {
    "save_steps": RESUMED_STEP,
    "save_total_limit": 9,
    "eval_strategy": "no",
    "max_eval_samples": 3,
}


def sweep_where_one_rank_sees_nothing(path: Path) -> None:
    """Rank 1 may not look which runs are finished: a network disk could show it older folders."""

    def unseen(_: Run) -> bool:
        raise AssertionError("this rank has looked for itself")

    look = property(unseen) if os.environ["RANK"] == "1" else Run.finished
    with mock.patch.object(Run, "finished", look):
        run_sweep(read_sweep(path))


def main(world: Path, folder: Path) -> None:
    tiny_task(TASK)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    for name in RUN[folder.name]:
        shared = {
            # one process takes two micro-batches where two ranks take one each
            "gradient_accumulation_steps": 2 // ranks,
            **SHARED,
            **METHODS[name],
        }
        paths = (world / "base", world / TASK)
        run_adapt(adapt_config(*paths, folder / name, folder / "no bank", TASK, **shared))
        if name not in RESUMED[folder.name]:
            continue
        again = folder / f"{name}-resumed"
        checkpoint = str(folder / name / f"checkpoint-{RESUMED_STEP}")
        run_adapt(
            adapt_config(
                *paths, again, folder / "no bank", TASK, resume_from_checkpoint=checkpoint, **shared
            )
        )
    if (folder / SWEEP).is_file():
        sweep_where_one_rank_sees_nothing(folder / SWEEP)
    shut_down()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
