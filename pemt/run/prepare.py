"""What training needs before its first step: the run's folder, batches, the prepared model; or a checkpoint's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from pemt.checkpoint import (
    Checkpoint,
    Checkpoints,
    Fresh,
    Resume,
    TrainState,
    load_lazily,
    start_run_folder,
    tracker_runs,
    write_tracker_runs,
)
from pemt.config import RunConfig
from pemt.data import StreamBatches, TaskData, TrainBatches, TrainStream, lengths_of
from pemt.engine import Engine, Tracker, open_trackers
from pemt.model import TrainedT5, base_digest, checked_base, read_lazy
from pemt.monitor import progress_logger
from pemt.run.build import BuiltModel
from pemt.run.caller_inputs import CallerInputs
from pemt.run.session import Session
from pemt.tasks import Task, task_text

Batches: TypeAlias = TrainBatches | StreamBatches


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a run reads before its first step; making one writes nothing."""

    config: RunConfig
    engine: Engine
    start: Fresh[Any] | Resume[Any]
    task: Task
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    data: TaskData
    caller: CallerInputs
    built: BuiltModel


def open_run(setup: Setup, session: Session) -> tuple[Checkpoints, Checkpoint | None]:
    """The run's folder, ready to be written, and the checkpoint to resume from."""
    config, engine, start, resumed = setup.config, setup.engine, setup.start, None
    with engine.together("reading the digest of the base model's weights"):
        checkpoints = Checkpoints(Path(config.output_dir), engine, config, _identity(setup))
    if isinstance(start, Resume):
        resumed = checkpoints.find(start.checkpoint, expected=session.saved_before)
        if not resumed and engine.is_main:
            progress_logger().info(
                f"{config.output_dir}: the run started here has no checkpoint yet"
            )
    session.attach_checkpoints(checkpoints)
    own = setup.caller.task
    task = None if own is None else task_text(own)
    engine.on_rank0(
        lambda: start_run_folder(config, fresh=isinstance(start, Fresh), task=task),
        "writing the run's configuration",
    )
    return checkpoints, resumed


def open_all_trackers(engine: Engine) -> list[Tracker]:
    """The trackers of `report_to` besides TensorBoard; none on other ranks than 0 (all ranks call).

    A resumed run goes on in the runs that it has begun there: they stand in the run's folder.

    Raises:
        ConfigError: one does not open.
    """
    folder = Path(engine.config.output_dir)

    def open_them() -> None:
        engine.trackers, runs = open_trackers(engine.config, tracker_runs(folder))
        if runs:
            write_tracker_runs(folder, runs)

    engine.on_rank0(open_them, "opening the trackers")
    return engine.trackers


def _identity(setup: Setup) -> dict[str, Any]:
    """What a checkpoint of this run belongs to, besides what the configuration tells."""
    train, data = setup.data.train, setup.data
    # What a finished run answers with: its data may be gone by then.
    measured = {"max_target_length": data.max_target_length} if data.is_measured else {}
    return {
        **measured,
        # What has chosen the best checkpoint so far, where it is not the task's own.
        "metrics": sorted(setup.caller.metrics) or None,
        "stage": setup.built.stage,
        "sources": setup.built.source_names,
        "train_examples": None if isinstance(train, TrainStream) else len(train),
        "base_sha256": base_digest(checked_base(setup.base)),
    }


def train_batches(setup: Setup, position: dict[str, Any] | None = None) -> Batches:
    """This rank's share of the training data; of a stream from a position on."""
    config = setup.config
    division: dict[str, Any] = {
        "batch_size": config.per_device_train_batch_size,
        "accumulation": config.gradient_accumulation_steps,
        "world_size": setup.engine.world_size,
        "rank": setup.engine.rank,
        "seed": config.effective_data_seed,
    }
    train = setup.data.train
    if isinstance(train, TrainStream):
        size = config.shuffle_buffer_size
        return StreamBatches(train, **division, buffer_size=size, position=position)
    return TrainBatches(lengths_of(train), **division)


def total_steps_of(config: RunConfig, batches: Batches) -> int:
    """Optimizer steps of the whole run: `max_steps`, or `num_train_epochs` times an epoch's."""
    if config.max_steps > 0:
        return config.max_steps
    assert batches.steps_per_epoch is not None, "a stream needs max_steps"
    return batches.steps_per_epoch * config.num_train_epochs


def warmup_notes(config: RunConfig, total_steps: int) -> list[str]:
    """Warnings about a warm-up that does not do what was asked for."""
    steps = config.warmup_steps
    if steps and config.lr_scheduler_type == "constant":
        return [
            f"warmup_steps {steps}: not used, `lr_scheduler_type: constant` has no warm-up; "
            "`constant_with_warmup` has"
        ]
    if steps >= total_steps > 0:
        return [
            f"warmup_steps {steps}: the run has {total_steps} steps, so its learning rate never gets beyond "
            f"{max(total_steps - 1, 0) / steps:.0%} of learning_rate; lower warmup_steps, or train longer"
        ]
    return []


def prepare(
    config: RunConfig,
    engine: Engine,
    model: TrainedT5,
    resumed: Checkpoint | None,
    *,
    total_steps: int,
) -> LambdaLR:
    """Optimizer over the trained parameters alone, schedule, and the model into the engine."""
    trained = dict(model.trainable_parameters())
    if resumed:
        load_lazily(resumed.weights, trained)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.torch_compile:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    # On the bare optimizer, whose groups DeepSpeed keeps: a prepared schedule would step once per rank.
    schedule = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_steps,
    )
    engine.prepare(model, optimizer, read_lazy=read_lazy)
    engine.seed(config.seed, per_rank=True)
    return schedule


def restore(setup: Setup, schedule: LambdaLR, resumed: Checkpoint) -> TrainState:
    """Optimizer, schedule and generators as they were when the checkpoint was saved."""
    state = resumed.state
    # One token: a batch of the data may be the very one that gives no finite loss.
    token = torch.tensor([[setup.tokenizer.eos_token_id]], device=setup.engine.device)
    setup.engine.load_optimizer_state(
        resumed.weights,
        resumed.moments,
        step=state.step - state.skipped,
        batch={"input_ids": token, "attention_mask": torch.ones_like(token), "labels": token},
    )
    set_schedule_step(schedule, state.step)
    setup.engine.load_random_states(resumed.random)
    return state


def set_schedule_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule where `step` calls of its own `step` would have taken it."""
    schedule.last_epoch = step - 1
    schedule.step()
