"""What every launched rank runs: both stages, resumes, and what only the ranks can see of the optimizer.

    accelerate launch ... -m tests.launch.launched WORLD FOLDER

WORLD holds base models and task files, and `zero2/`, the folder of the launch that goes first. Runs
and report.json go to FOLDER, whose name says how much is run: elsewhere than at ZeRO-2 what its code does otherwise,
with offloading resumes alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pemt.checkpoint import Fresh
from pemt.config.schema import AdapterConfig, ExpertConfig, MixtureConfig, RunConfig
from pemt.engine import Engine, shut_down
from pemt.engine.exit import run_and_exit
from pemt.engine.optimizer_state import MOMENTS
from pemt.model import PemtT5
from pemt.run.caller_inputs import CallerInputs
from pemt.run.prepare import Setup, prepare, train_batches
from pemt.run.train import run_adapt, run_source, set_up
from tests.launch.launched_cuts import cuts
from tests.support.tiny import adapt_config, source_config, tiny_task

SOURCES = ("tiny-a", "tiny-b")
TARGET = "tiny-target"
EXPERT = ExpertConfig(rank=4)
# On attention too, and on different layers: both on q and wo, the second on v besides.
EXPERTS = {
    SOURCES[0]: ExpertConfig(rank=4, target_modules=["q", "wo"]),
    SOURCES[1]: ExpertConfig(rank=4, target_modules=["q", "v", "wo"]),
}
RESUMED_STEP = 3
SOME = ("zero0", "zero1")  # T5 alone, and stage 1 not looked into
FEW = (*SOME, "zero3")  # one source, the target on ZeRO-2's bank, one way of cutting batches
BF16 = (
    "zero2",
    "zero3",
    "zero2_offload",
    "zero3_offload",
)  # resume from a checkpoint of their own too, in bf16


def main(world: Path, folder: Path) -> None:
    for task in (*SOURCES, TARGET):
        tiny_task(task)
    base, bank = world / "base", folder / "bank"
    plain = MixtureConfig(prompt_dropout=0.0)
    # One process over the same global batches takes two micro-batches a step where two ranks take one each.
    fields: dict[str, Any] = {
        "gradient_accumulation_steps": 2 // int(os.environ.get("WORLD_SIZE", 1)),
        # A batch a rank: under ZeRO-3 each token of an answer gathers all weights.
        "max_eval_samples": 6,
    }
    unseen = {**fields, "eval_strategy": "no"}
    # Ranks draw dropout of their own, so the runs that are held against each other have none.
    saving = {**fields, "save_steps": RESUMED_STEP, "save_total_limit": 9, "mixture": plain}
    if folder.name.endswith("_offload"):
        resume(world, folder, saving)
        shut_down()
        return
    some, few = folder.name in SOME, folder.name in FEW
    for task in SOURCES[: 1 if few else None]:
        run_source(
            source_config(
                base, world / task, folder / task, bank, task, expert=EXPERTS[task], **unseen
            )
        )

    data, bank = world / TARGET, (world / "zero2" if few else folder) / "bank"
    results = run_adapt(adapt_config(base, data, folder / "adapt", bank, TARGET, **saving))
    resume(world, folder, saving)
    report = {
        "results": results,
        "adapt": inspect_run(adapt_config(base, data, folder / "y", bank, TARGET, **fields)),
        "cuts": cuts(world, folder, batches=(2,) if few else (8, 4, 2, 1)),
    }
    if not some:
        t5gemma(world, folder, unseen)
        paths = (base, data, folder / "x", folder / "bank")
        report["source"] = inspect_run(source_config(*paths, TARGET, expert=EXPERT, **fields))
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shut_down()


def resume(world: Path, folder: Path, saving: dict[str, Any]) -> None:
    """Resume from what ZeRO-2 saved; in some launches save, and resume, in bf16 with dropout besides."""
    base, data, first = world / "base", world / TARGET, world / "zero2"
    bank = first / "bank"
    saved = adapt_config(
        base,
        data,
        folder / "resumed",
        bank,
        TARGET,
        resume_from_checkpoint=str(first / "adapt" / f"checkpoint-{RESUMED_STEP}"),
        **saving,
    )
    run_adapt(saved)
    if folder.name not in BF16:
        return
    dropout = MixtureConfig(prompt_dropout=0.5)
    saving = {**saving, "mixture": dropout, "bf16": True, "eval_strategy": "no"}
    halved = adapt_config(base, data, folder / "bf16", bank, TARGET, **saving)
    run_adapt(halved)
    checkpoint = str(folder / "bf16" / f"checkpoint-{RESUMED_STEP}")
    run_adapt(
        replace(halved, output_dir=str(folder / "bf16-resumed"), resume_from_checkpoint=checkpoint)
    )


def t5gemma(world: Path, folder: Path, fields: dict[str, Any]) -> None:
    """Both stages on another family, whose decoder has a width of its own; stage 2 with the expert of ZeRO-2."""
    base, task = world / "gemma-base", SOURCES[1]
    expert = ExpertConfig(rank=4, target_modules=["q_proj", "down_proj"])
    shared = {**fields, "max_eval_samples": 4}
    paths = (base, world / task, folder / "gemma-source", folder / "gemma-bank")
    run_source(source_config(*paths, task, expert=expert, **shared))
    shared |= {
        "mixture": MixtureConfig(prompt_dropout=0.0),
        "adapter": AdapterConfig(reduction_factor=4),
    }
    paths = (base, world / TARGET, folder / "gemma", world / "zero2" / "gemma-bank")
    run_adapt(adapt_config(*paths, TARGET, **shared))


def inspect_run(config: Any) -> dict[str, Any]:
    setup = set_up(config, Engine(config), Fresh(config=config), CallerInputs())
    return inspect(config, setup, setup.built.model)


def inspect(config: RunConfig, setup: Setup, model: PemtT5) -> dict[str, Any]:
    """Names and sizes of what is trained, every rank's optimizer bytes and first batches."""
    engine = setup.engine
    trained = {name: parameter.numel() for name, parameter in model.trainable_parameters()}
    with broadcast_bytes() as sent, agreements() as checked:
        prepare(config, engine, model, None, total_steps=1)
    batches = train_batches(setup)
    shares = [indices for step in batches.epoch(0) for indices in step]
    take_one_step(config, setup)
    found = {
        "trained": trained,
        "broadcast_bytes": sum(sent),
        "agreements": len(checked),
        "moment_bytes": every_rank(engine, moment_bytes(engine)),
        "shares": every_rank(engine, shares),
        "examples": len(setup.data.train),
    }
    engine.release()
    return found


def take_one_step(config: RunConfig, setup: Setup) -> None:
    from pemt.run.loop import _batch

    engine = setup.engine
    for number, indices in enumerate(next(train_batches(setup).epoch(0))):
        last = number == config.gradient_accumulation_steps - 1
        batch = {key: value.to(engine.device) for key, value in _batch(setup, indices).items()}
        engine.backward(engine.model(**batch).loss, last=last)
    engine.step()


def moment_bytes(engine: Engine) -> int:
    """Bytes of Adam moments that this rank holds."""
    states = engine.base_optimizer.state.values()
    return sum(
        state[key].numel() * state[key].element_size() for state in states for key in MOMENTS
    )


def every_rank(engine: Engine, value: Any) -> list[Any]:
    if engine.world_size == 1:
        return [value]
    values: list[Any] = [None] * engine.world_size
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def agreements() -> Iterator[list[Engine]]:
    """Engines that the block asks whether DeepSpeed agrees with the run."""
    checked: list[Engine] = []
    check = Engine._check_deepspeed_agrees

    def counting(engine: Engine) -> None:
        checked.append(engine)
        check(engine)

    Engine._check_deepspeed_agrees = counting  # type: ignore[method-assign]
    try:
        yield checked
    finally:
        Engine._check_deepspeed_agrees = check  # type: ignore[method-assign]


@contextmanager
def broadcast_bytes() -> Iterator[list[int]]:
    """Bytes of every tensor that the block broadcasts, before they are sent."""
    sent: list[int] = []
    broadcast = torch.distributed.broadcast

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return broadcast(tensor, *args, **kwargs)

    torch.distributed.broadcast = counting
    try:
        yield sent
    finally:
        torch.distributed.broadcast = broadcast


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2])))
