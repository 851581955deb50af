"""What every launched rank runs to see faults survived: bad numbers, damaged checkpoints, uneven ends.

    accelerate launch ... -m tests.launch.launched_faults WORLD FOLDER PART...

WORLD holds a base model and task files. Runs and report.json go to FOLDER; every part adds to the report.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pemt.checkpoint.lock import LOCK, RunLock
from pemt.config import TENSORBOARD, ExpertConfig, MixtureConfig, PemtError, SourceConfig
from pemt.engine import Engine, shut_down
from pemt.engine.exit import run_and_exit
from pemt.model import PemtT5
from pemt.monitor.board import TensorBoardWriter
from pemt.run import loop, train
from pemt.run.nan_guard import NonFiniteGuard
from pemt.run.train import run_adapt, run_source
from pemt.storage import folders as storage
from tests.support.damages import DAMAGES, Damage, flip_a_bit
from tests.support.tiny import adapt_config, source_config, tiny_task

SOURCE, TARGET = "tiny-a", "tiny-target"
STEPS, BAD_STEP = 4, 2
GUILTY = 1  # the rank whose numbers go wrong
KINDS = (("loss", "fp32"), ("gradient", "bf16"))  # what goes bad, in which precision
ENDS = ("one", "uneven", "odd")
WITHOUT = {"ignored": ("labels",), "padding": ("input_ids", "attention_mask")}  # on one rank
FEW_ENDS = ("one", "odd", "ignored")


def config_of(world: Path, output_dir: Path, **fields: Any) -> SourceConfig:
    given = {"expert": ExpertConfig(rank=2), "max_steps": STEPS, "save_total_limit": 9, **fields}
    given = {"eval_strategy": "no", "save_steps": 1, "gradient_accumulation_steps": 2, **given}
    given = {"max_eval_samples": 4, **given}
    bank = output_dir.parent / "bank"
    return source_config(world / "base", world / SOURCE, output_dir, bank, SOURCE, **given)


@contextmanager
def injected(kind: str, steps: set[int], *, micro_batch: int = 1) -> Iterator[None]:
    """Make the first (0) or the second (1) micro-batch of these steps bad, on one rank.

    `loss`: Inf is added to the loss, whose gradient stays finite. `gradient`: one parameter's gradient
    becomes NaN behind a finite loss.
    """
    forward, backward = PemtT5.forward, Engine.backward
    micro_batches = count()
    bad = {2 * (step - 1) + micro_batch for step in steps}

    def bad_forward(model: PemtT5, **batch: Tensor) -> Any:
        out = forward(model, **batch)
        if model.training and next(micro_batches) in bad:
            out.loss = out.loss + math.inf
        return out

    def bad_backward(engine: Engine, loss: Tensor, *, last: bool) -> None:
        hook = None
        if next(micro_batches) in bad:
            parameter = engine.optimizer_state.parameters[-1][1]
            hook = parameter.register_hook(lambda gradient: gradient * math.nan)
        backward(engine, loss, last=last)
        if hook is not None:
            hook.remove()

    if int(os.environ["RANK"]) != GUILTY:  # there is no process group before the first run
        pass
    elif kind == "loss":
        PemtT5.forward = bad_forward
    else:
        Engine.backward = bad_backward
    try:
        yield
    finally:
        PemtT5.forward, Engine.backward = forward, backward


def bad_numbers(world: Path, folder: Path) -> dict[str, Any]:
    for kind, precision in KINDS:
        config = config_of(world, folder / kind, bf16=precision == "bf16")
        with injected(kind, {BAD_STEP}, micro_batch=int(precision == "fp32")):
            run_source(config)
        checkpoint = str(Path(config.output_dir) / f"checkpoint-{BAD_STEP}")
        again = folder / f"{kind}-resumed"
        run_source(replace(config, output_dir=str(again), resume_from_checkpoint=checkpoint))
    ended = config_of(world, folder / "ended", max_skipped_steps=3, max_steps=9)
    with injected("loss", {1, 3, 4, 5, 6}):
        told = {"ended": error_of(lambda: run_source(ended))}
    return {**told, "apart": apart(config_of(world, folder / "apart"))}


def apart(config: SourceConfig) -> list[str]:
    """One rank believes that the second step was skipped."""
    skipped = dist.get_rank() == GUILTY
    with mock.patch.object(
        NonFiniteGuard, "check", lambda _, step, *__: skipped and step == BAD_STEP
    ):
        return error_of(lambda: run_source(config))


def damaged_checkpoints(world: Path, folder: Path) -> dict[str, Any]:
    config = config_of(world, folder / "damaged", save_total_limit=3)
    run_source(config)
    going_on = replace(config, resume_from_checkpoint=True)
    on_rank_0(
        lambda: flip_a_bit(folder / "damaged" / f"checkpoint-{STEPS}" / "moments.safetensors")
    )
    run_source(going_on)

    def damage_all() -> None:
        for checkpoint in (folder / "damaged").glob("checkpoint-*"):
            flip_a_bit(checkpoint / "trained.safetensors")

    on_rank_0(damage_all)
    none_left = error_of(lambda: run_source(going_on))
    return {"none_left": none_left}


def every_damage(world: Path, folder: Path) -> dict[str, Any]:
    """Every kind of damage to the newest of three checkpoints, and what resumes from there."""
    given = {"save_steps": 2, "max_steps": 6}  # saved at 5 too, where the epoch ends
    run_source(config_of(world, folder / "whole", **given))
    run_source(config_of(world, folder / "other", data_seed=7, **given))

    def copy_damaged(damage: Damage) -> None:
        copied = shutil.copytree(folder / "whole", folder / damage.__name__)
        damage(Path(copied) / "checkpoint-6", folder / "other")

    for damage in DAMAGES:
        on_rank_0(lambda damage=damage: copy_damaged(damage))
        run_source(config_of(world, folder / damage.__name__, resume_from_checkpoint=True, **given))
    return {}


def stale_view(world: Path, folder: Path) -> dict[str, Any]:
    """One rank's network disk shows it an older folder, so that it must not look; then the run is tried again."""

    def unseen(*_: Any, **__: Any) -> None:
        raise AssertionError("this rank has looked for itself")

    stale = dist.get_rank() == GUILTY
    with mock.patch.object(train, "resolve_run", unseen if stale else train.resolve_run):
        config = config_of(world, folder / "stale")
        return {"stale": [error_of(lambda: run_source(config)) for _ in range(2)]}


def crowded(world: Path, folder: Path) -> dict[str, Any]:
    """The folder is held by a living process when two ranks begin a run in it, and free when they try again."""
    config = config_of(world, folder / "crowded")
    holder = RunLock(folder / "crowded")
    on_rank_0(holder.acquire)
    refused = error_of(lambda: run_source(config))
    assert [path.name for path in (folder / "crowded").iterdir()] == [LOCK]
    on_rank_0(holder.release)
    return {"crowded": [refused, error_of(lambda: run_source(config))]}


def uneven_ends(world: Path, folder: Path, few: bool = False) -> dict[str, Any]:
    run_source(config_of(world, folder / "source"))
    results = {}
    for name in ENDS:
        if not few or name in FEW_ENDS:
            results[name] = run_adapt(end_config(world, folder, name))
    for name, fields in WITHOUT.items():
        if not few or name in FEW_ENDS:
            with one_rank_without(*fields):
                results[name] = run_adapt(end_config(world, folder, "uneven", run=name))
    return {"ends": results}


def end_config(world: Path, folder: Path, name: str, *, run: str | None = None) -> Any:
    return adapt_config(
        world / "base",
        world / name,
        folder / (run or name),
        folder / "bank",
        TARGET,
        mixture=MixtureConfig(sparsity_over_padding=False),
        num_train_epochs=2,
        eval_strategy="no",  # the test does the same
    )


@contextmanager
def one_rank_without(*fields: str) -> Iterator[None]:
    """One rank's labels are all -100, or its inputs padding alone."""
    whole = loop.collate

    def collate(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        batch = whole(*args, **kwargs)
        if dist.get_rank() == GUILTY:
            for name in fields:
                batch[name] = torch.full_like(batch[name], -100 if name == "labels" else 0)
        return batch

    loop.collate = collate
    try:
        yield
    finally:
        loop.collate = whole


def on_rank_0(act: Callable[[], None]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def error_of(act: Callable[[], Any]) -> list[str]:
    """The error that each rank got."""
    try:
        act()
        told = "none"
    except PemtError as error:
        told = f"{type(error).__name__}: {error}"
    all_gather_object: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(all_gather_object, told)
    return all_gather_object


def refusing_disk(world: Path, folder: Path) -> dict[str, Any]:
    """The disk refuses TensorBoard's curves, and the first checkpoint (`warn`) or all of them (`stop`)."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fs_op, told = storage.fs_op, {}
    for save_errors, most in (("warn", 1), ("stop", 99)):
        refusals = iter([full] * most)

        def refusing(
            operation: Callable[..., Any], *arguments: Any, refusals: Any = refusals
        ) -> None:
            if operation.__name__ == "save_tensors" and (error := next(refusals, None)):
                raise error
            fs_op(operation, *arguments)

        fields = {"save_errors": save_errors, "max_steps": 9, "report_to": [TENSORBOARD]}
        config = config_of(world, folder / save_errors, **fields)
        with (
            mock.patch.object(storage, "fs_op", refusing),
            mock.patch.object(TensorBoardWriter, "log_scalars", side_effect=full),
        ):
            told[save_errors] = error_of(lambda config=config: run_source(config))
    return {"disk": told}


PARTS = {
    "disk": refusing_disk,
    "stale": stale_view,
    "crowded": crowded,
    "damages": every_damage,
    "numbers": bad_numbers,
    "checkpoints": damaged_checkpoints,
    "ends": uneven_ends,
    "few ends": partial(uneven_ends, few=True),
}


def main(world: Path, folder: Path, parts: list[str]) -> None:
    for task in (SOURCE, TARGET):
        tiny_task(task)
    report: dict[str, Any] = {}
    for part in parts:
        report |= PARTS[part](world, folder)
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shut_down()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
