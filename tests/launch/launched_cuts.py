"""Two steps over the same rows, cut into ranks, micro-batches and accumulation in every way that the launch can."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pemt.checkpoint import Fresh
from pemt.engine import Engine
from pemt.run.caller_inputs import CallerInputs
from pemt.run.loop import _take_step
from pemt.run.meter import Meter
from pemt.run.prepare import prepare, train_batches
from pemt.run.train import set_up
from pemt.tasks import Task, register_task
from tests.support.tiny import adapt_config

UNEVEN, ROWS, STEPS = "tiny-uneven", 8, 2
SCALARS = ("train/loss", "train/ce_loss", "train/grad_norm")


def write_uneven_files(folder: Path) -> None:
    """Targets of 2 to 16 tokens, longest where the source is."""
    folder.mkdir()
    rows = [{"text": "box " * (i + 1), "label": "red " * (2 * i) + "lid"} for i in range(ROWS)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cuts(world: Path, folder: Path, *, batches: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What every way gives, as `ranks x batch x accumulation`."""
    register_task(
        Task(
            name=UNEVEN,
            description="says what the text says",
            template="text : {text}",
            metrics=("squad",),
            max_target_length=32,
        )
    )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    found = {}
    for batch in batches:
        accumulation = ROWS // (ranks * batch)
        if accumulation:
            config = adapt_config(
                world / "base",
                world / UNEVEN,
                folder / "cuts",
                folder / "bank",
                UNEVEN,
                method="adapter",
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                warmup_steps=0,
            )
            found[f"{ranks}x{batch}x{accumulation}"] = two_steps(config)
    return found


def two_steps(config: Any) -> dict[str, Any]:
    """Losses and gradient norms of each, and the weights behind the last."""
    setup = set_up(config, Engine(config), Fresh(config=config), CallerInputs())
    engine = setup.engine
    schedule = prepare(config, engine, setup.built.model, None, total_steps=2 * STEPS)
    meter, logged = Meter(engine), []
    for micro_batches in train_batches(setup).steps(0, STEPS):
        rates, _ = _take_step(setup, schedule, meter, micro_batches)
        scalars = {**meter.read()[0], **rates}
        logged.append([scalars[tag] for tag in SCALARS])
    weights = {
        name: tensor.flatten()[:20].tolist()
        for name, tensor in engine.optimizer_state.weights().items()
    }
    engine.release()
    return {"logged": logged, "weights": weights}
