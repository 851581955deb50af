"""What every launched rank runs: a base model larger than a rank may hold, sharded as it is read, or read whole.

    accelerate launch ... -m tests.launch.launched_start WORLD FOLDER

WORLD holds the base model, the bank and the task's files. report.json goes to FOLDER, `sharded` or `whole`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import pemt.run.train
from pemt.checkpoint import Fresh
from pemt.engine import Engine, full_size, shut_down
from pemt.engine.exit import run_and_exit
from pemt.engine.process import peak, watch_peak
from pemt.model.base import load_pretrained
from pemt.run.caller_inputs import CallerInputs
from pemt.run.loop import _batch
from pemt.run.prepare import Setup, prepare, train_batches
from tests.launch.launched import broadcast_bytes, every_rank
from tests.support.tiny import adapt_config, tiny_task

TASK = "tiny-start"
STEPS = 2
M_MMAP_THRESHOLD = -3  # of malloc.h
CPU = torch.device("cpu")


def main(world: Path, folder: Path) -> None:
    # Freed memory goes back at once; otherwise glibc keeps far more of it than the model is large.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536) == 1
    tiny_task(TASK)
    if (
        folder.name == "whole"
    ):  # the control: read whole by every rank, and handed to DeepSpeed like that
        pemt.run.train.load_pretrained = lambda *names, lazy: load_pretrained(*names)  # type: ignore[assignment]
        Engine._materialize = lambda *_: None  # type: ignore[method-assign]
    report = started(world, folder)
    report["file_bytes"] = (world / "base" / "model.safetensors").stat().st_size
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shut_down()


def started(world: Path, folder: Path) -> dict[str, Any]:
    """How much resident memory each rank takes at most, what is broadcast, and the losses."""
    config = adapt_config(world / "base", world / TASK, folder / "run", world / "bank", TASK)
    before = watch_peak(CPU)
    with broadcast_bytes() as sent:
        setup = pemt.run.train.set_up(config, Engine(config), Fresh(config=config), CallerInputs())
        prepare(config, setup.engine, setup.built.model, None, total_steps=STEPS)
    trained = sum(full_size(each) for _, each in setup.built.model.trainable_parameters())
    at_start = peak(CPU) - before
    losses = take_steps(setup)
    found = {
        "start_bytes": every_rank(setup.engine, at_start),
        "peak_bytes": every_rank(setup.engine, peak(CPU) - before),
        "broadcast_bytes": sum(sent),
        "trained_bytes": 4 * trained,
        "losses": losses,
    }
    setup.engine.release()
    return found


def take_steps(setup: Setup) -> list[float]:
    losses = []
    for (indices,) in list(train_batches(setup).epoch(0))[:STEPS]:
        batch = {
            key: value.to(setup.engine.device) for key, value in _batch(setup, indices).items()
        }
        loss = setup.engine.model(**batch).loss
        setup.engine.backward(loss, last=True)
        setup.engine.step()
        losses.append(float(setup.engine.mean(loss.detach())))
    return losses


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
