"""What every launched rank runs: both stages, resumes, and what only the ranks can see of the optimizer.

    accelerate launch ... -m tests.launched WORLD FOLDER

WORLD holds base models and task files, and `zero2/`, the folder of the launch that goes first. Runs
and report.json go to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.build import build_model
from pemt.config import ExpertConfig, MixtureConfig, RunConfig
from pemt.engine import MOMENTS, Engine, shut_down
from pemt.loop import Setup, prepare, train_batches
from pemt.model import PemtT5
from pemt.train import run_adapt, run_source, set_up
from tests.tiny import adapt_config, source_config, tiny_task

SOURCES = ("tiny-a", "tiny-b")
TARGET = "tiny-target"
EXPERT = ExpertConfig(rank=4)
RESUMED_STEP = 3


def main(world: Path, folder: Path) -> None:
    for task in (*SOURCES, TARGET):
        tiny_task(task)
    base, bank = world / "base", folder / "bank"
    # One process over the same global batches takes two micro-batches a step where two ranks take one each.
    fields: dict[str, Any] = {
        "gradient_accumulation_steps": 2 // int(os.environ.get("WORLD_SIZE", 1))
    }
    for task in SOURCES:
        run_source(
            source_config(base, world / task, folder / task, bank, task, expert=EXPERT, **fields)
        )

    data = world / TARGET
    # Ranks draw dropout of their own, so the runs that are held against each other have none.
    plain = MixtureConfig(prompt_dropout=0.0)
    saving = {**fields, "save_steps": RESUMED_STEP, "save_total_limit": 9, "mixture": plain}
    results = run_adapt(adapt_config(base, data, folder / "adapt", bank, TARGET, **saving))
    first = world / "zero2"
    saved = adapt_config(
        base,
        data,
        folder / "resumed",
        first / "bank",
        TARGET,
        resume_from_checkpoint=str(first / "adapt" / f"checkpoint-{RESUMED_STEP}"),
        **saving,
    )
    run_adapt(saved)
    saving["mixture"] = MixtureConfig(prompt_dropout=0.5)
    dropped = adapt_config(base, data, folder / "dropout", bank, TARGET, **saving)
    run_adapt(dropped)
    checkpoint = str(folder / "dropout" / f"checkpoint-{RESUMED_STEP}")
    run_adapt(
        replace(
            dropped, output_dir=str(folder / "dropout-resumed"), resume_from_checkpoint=checkpoint
        )
    )

    halved = replace(dropped, output_dir=str(folder / "bf16"), bf16=True)
    run_adapt(halved)
    checkpoint = str(folder / "bf16" / f"checkpoint-{RESUMED_STEP}")
    run_adapt(
        replace(halved, output_dir=str(folder / "bf16-resumed"), resume_from_checkpoint=checkpoint)
    )

    report = {
        "results": results,
        "source": inspect_run(
            source_config(base, data, folder / "x", bank, TARGET, expert=EXPERT, **fields)
        ),
        "adapt": inspect_run(adapt_config(base, data, folder / "y", bank, TARGET, **fields)),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shut_down()


def inspect_run(config: Any) -> dict[str, Any]:
    setup = set_up(config)
    built = build_model(
        config, base=setup.base, tokenizer=setup.tokenizer, description=setup.task.description
    )
    return inspect(config, setup, built.model)


def inspect(config: RunConfig, setup: Setup, model: PemtT5) -> dict[str, Any]:
    """Names and sizes of what is trained, every rank's optimizer bytes and first batches."""
    engine = setup.engine
    trained = {name: parameter.numel() for name, parameter in model.trainable_parameters()}
    prepare(config, engine, model, None, total_steps=1)
    batches = train_batches(config, setup)
    shares = [indices for step in batches.epoch(0) for indices in step]
    take_one_step(config, setup)
    found = {
        "trained": trained,
        "moment_bytes": every_rank(engine, moment_bytes(engine)),
        "shares": every_rank(engine, shares),
        "examples": len(setup.data.train),
    }
    engine.release()
    return found


def take_one_step(config: RunConfig, setup: Setup) -> None:
    from pemt.loop import _batch

    engine = setup.engine
    for number, indices in enumerate(next(train_batches(config, setup).epoch(0))):
        last = number == config.gradient_accumulation_steps - 1
        engine.backward(engine.model(**_batch(setup, indices)).loss, last=last)
    engine.step()


def moment_bytes(engine: Engine) -> int:
    """Bytes of Adam moments that this rank holds."""
    states = engine.base_optimizer.state.values()
    return sum(
        state[key].numel() * state[key].element_size() for state in states for key in MOMENTS
    )


def every_rank(engine: Engine, value: Any) -> list[Any]:
    import torch.distributed as dist

    if engine.world_size == 1:
        return [value]
    values: list[Any] = [None] * engine.world_size
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
