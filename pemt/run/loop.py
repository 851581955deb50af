"""The training loop of both stages: flat, from the first step or a checkpoint's, to the best weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from pemt.checkpoint import (
    Checkpoint,
    Checkpoints,
    TrainState,
    holds_run,
    load_into_model,
    resume_target,
    start_run_folder,
    warmup_notes,
)
from pemt.config import RunConfig
from pemt.data import (
    StreamBatches,
    TaskData,
    TrainBatches,
    TrainStream,
    collate,
    lengths_of,
)
from pemt.engine import Engine, Interrupted, full_size
from pemt.model import TrainedT5, base_digest, checked_base, read_lazy
from pemt.monitor import Monitor
from pemt.run.build import Built
from pemt.run.evaluate import Evaluation, evaluate
from pemt.run.meter import Meter, shares
from pemt.run.nan_guard import NonFiniteGuard
from pemt.run.session import Session
from pemt.storage import TensorFile
from pemt.tasks import Task, told_once

Batches: TypeAlias = TrainBatches | StreamBatches


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run needs before its model is built; making one writes nothing."""

    engine: Engine
    task: Task
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    data: TaskData


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What training leaves.

    Args:
        weights: the best checkpoint's trained weights, fp32, by parameter name, in their file.
        progress: the last step, and the best one.
        epoch: passes over the training data.
    """

    weights: TensorFile
    progress: TrainState
    epoch: float


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same from step to step."""

    config: RunConfig
    setup: Setup
    built: Built
    session: Session
    checkpoints: Checkpoints
    monitor: Monitor
    batches: Batches
    total_steps: int

    def ends_epoch_at(self, step: int) -> bool:
        per_epoch = self.batches.steps_per_epoch
        return step == self.total_steps or (per_epoch is not None and step % per_epoch == 0)

    def validates_at(self, step: int) -> bool:
        if step == 0:
            return False
        interval = self.config.eval_steps
        if interval is not None:
            return step % interval == 0 or step == self.total_steps
        return self.config.eval_strategy == "epoch" and self.ends_epoch_at(step)

    def saves_at(self, step: int) -> bool:
        """After each validation, or after each epoch where there is none; and as often as was asked for."""
        interval = self.config.save_steps
        return (
            self.validates_at(step)
            or (interval is not None and step % interval == 0)
            or (self.config.eval_strategy == "no" and self.ends_epoch_at(step))
        )


def fit(config: RunConfig, setup: Setup, built: Built, session: Session) -> Fitted:
    """Train, validate and save until the configured end (all ranks call).

    Args:
        config: the run.
        setup: engine, task, tokenizer and data.
        built: the model, not yet prepared; a checkpoint of one stage is refused by the other.
        session: tells when to stop.

    Raises:
        PemtError: the run cannot start, resume, or write its files.
        Interrupted: a rank was told to stop; what was trained is saved.
    """
    engine, model = setup.engine, built.model
    checkpoints, resumed = _begin(config, setup, built, session)
    batches = train_batches(config, setup, resumed.progress.position if resumed else None)
    total_steps = _total_steps(config, batches)
    schedule = prepare(config, engine, model, resumed, total_steps=total_steps)
    progress = _restore(setup, schedule, resumed) if resumed else TrainState()
    session.set_step(progress.step)
    model.train()
    with (
        Monitor(
            Path(config.output_dir),
            total_steps=total_steps,
            initial_step=progress.step,
            is_main=engine.is_main,
            description=f"{built.stage} {setup.task.name}",
            gates=built.gate_names,
        ) as monitor,
        checkpoints,
    ):
        run = _Run(
            config=config,
            setup=setup,
            built=built,
            session=session,
            checkpoints=checkpoints,
            monitor=monitor,
            batches=batches,
            total_steps=total_steps,
        )
        _log_config(run, resumed)
        if run.validates_at(progress.step) and progress.validated_step != progress.step:
            progress = _finish_step(run, progress)  # it was stopped before this validation
        meter = Meter(engine)
        guard = NonFiniteGuard(config, engine, partial(_rows, setup), tell=monitor.message)
        for micro_batches in batches.steps(progress.step, total_steps):
            rates, losses = _take_step(setup, schedule, meter, micro_batches)
            step, norm = progress.step + 1, rates["train/grad_norm"]
            skipped = progress.skipped + guard.check(step, norm, micro_batches, losses)
            progress = replace(progress, step=step, skipped=skipped, position=batches.position())
            session.set_step(step)
            if step % config.logging_steps == 0 or step == total_steps:
                _report(run, meter, step, {**rates, "train/skipped_steps": skipped})
            with meter.paused():
                progress = _finish_step(run, progress)
        _finish_saving(run)
    best = checkpoints.best_weights(progress)
    return Fitted(weights=best, progress=progress, epoch=batches.epochs_at(progress.step))


def _total_steps(config: RunConfig, batches: Batches) -> int:
    if config.max_steps > 0:
        return config.max_steps
    assert batches.steps_per_epoch is not None, "a stream needs max_steps"
    return batches.steps_per_epoch * config.num_train_epochs


def _begin(
    config: RunConfig, setup: Setup, built: Built, session: Session
) -> tuple[Checkpoints, Checkpoint | None]:
    """The run's folder, ready to be written, and what to go on from."""
    engine = setup.engine
    with engine.together("reading the digest of the base model's weights"):
        checkpoints = Checkpoints(Path(config.output_dir), engine, config, _identity(setup, built))
    resumed = checkpoints.resume(resume_target(config), expected=session.saved_before)
    session.attach_checkpoints(checkpoints)
    if (
        engine.is_main
        and resume_target(config)
        and not resumed
        and holds_run(Path(config.output_dir))
    ):
        print(f"{config.output_dir}: the run begun here had saved no checkpoint yet", flush=True)
    engine.on_rank0(lambda: start_run_folder(config), "writing the run's configuration")
    return checkpoints, resumed


def _identity(setup: Setup, built: Built) -> dict[str, Any]:
    """What a checkpoint of this run belongs to, besides what the configuration tells."""
    train, data = setup.data.train, setup.data
    # What a finished run answers with: its data may be gone by then.
    measured = {"max_target_length": data.max_target_length} if data.is_measured else {}
    return {
        **measured,
        "stage": built.stage,
        "sources": built.source_names,
        "train_examples": None if isinstance(train, TrainStream) else len(train),
        "base_sha256": base_digest(checked_base(setup.base)),
    }


def _take_step(
    setup: Setup, schedule: LambdaLR, meter: Meter, micro_batches: list[list[Any]]
) -> tuple[dict[str, float], list[Tensor]]:
    """One optimizer step over this rank's micro-batches: its learning rate and gradient norm, and their losses."""
    engine = setup.engine
    assert isinstance(engine.module, TrainedT5)
    weight, losses = engine.module.sparsity_loss_weight, []
    batches = [_batch(setup, indices) for indices in micro_batches]
    for number, (batch, share) in enumerate(zip(batches, shares(engine, batches), strict=True)):
        batch = {key: value.to(engine.device) for key, value in batch.items()}
        out = engine.model(**batch)
        step_loss = share.of_loss(out, weight)
        engine.backward(step_loss, last=number == len(batches) - 1)
        meter.add(out, batch, share, step_loss)
        losses.append(out.loss.detach())
    learning_rate = float(schedule.get_last_lr()[0])
    grad_norm = engine.step()
    schedule.step()
    return {"train/learning_rate": learning_rate, "train/grad_norm": grad_norm}, losses


def _report(run: _Run, meter: Meter, step: int, rates: dict[str, float]) -> None:
    """What the steps since the last report gave, to the logs and the bar (all ranks call)."""
    scalars, gates_LK = meter.read()
    gates = {} if gates_LK is None else run.built.gate_names.scalars(gates_LK)
    epoch = {"train/epoch": run.batches.epochs_at(step)}
    run.monitor.log(step, {**scalars, **rates, **epoch, **gates})
    run.monitor.advance(
        step,
        loss=scalars["train/loss"],
        samples_per_second=scalars["train/samples_per_second"],
    )
    for line in run.batches.notes(at_end=step == run.total_steps):
        run.monitor.message(line)


def _finish_step(run: _Run, progress: TrainState) -> TrainState:
    """Validate and save where it is due; save and leave where a rank was told to stop."""
    _tell_of_saving(run)
    try:
        run.session.check()
        if run.validates_at(progress.step):
            progress = _validate(run, progress)
    except Interrupted:
        run.checkpoints.save(progress)
        _finish_saving(run)
        raise
    if run.saves_at(progress.step):
        run.checkpoints.save(progress)
    return progress


def _finish_saving(run: _Run) -> None:
    try:
        run.checkpoints.finish()
    finally:
        _tell_of_saving(run)


def _tell_of_saving(run: _Run) -> None:
    for line in run.checkpoints.lines():
        run.monitor.message(line)


def _log_config(run: _Run, resumed: Checkpoint | None) -> None:
    """What this run is, to the logs and the terminal."""
    monitor, engine = run.monitor, run.setup.engine
    size = _size_line(run.built.model, engine)
    with engine.together("opening the logs"):  # rank 0 alone has some
        monitor.log_config(run.config, {"job": size, "device": str(engine.device)})
    warmup = warmup_notes(run.config, run.total_steps)
    for line in (size, *(resumed.notes if resumed else ()), *run.setup.data.notes, *warmup):
        monitor.message(line)
    if resumed:
        step = resumed.progress.step
        monitor.message(f"going on after step {step} of {run.total_steps}: {resumed.folder}")


def _size_line(model: TrainedT5, engine: Engine) -> str:
    trained = sum(full_size(parameter) for _, parameter in model.trainable_parameters())
    total = sum(full_size(parameter) for parameter in model.parameters())
    stage = "no DeepSpeed" if engine.zero_stage is None else f"ZeRO-{engine.zero_stage}"
    return (
        f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}); "
        f"{engine.world_size} rank(s), {stage}, {engine.precision}; a checkpoint takes {12 * trained / 1e6:,.1f} MB"
    )


def train_batches(
    config: RunConfig, setup: Setup, position: dict[str, Any] | None = None
) -> Batches:
    """This rank's share of the training data; of a stream from a position on."""
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


def _rows(setup: Setup, micro_batch: list[Any]) -> list[dict[str, Any]]:
    """A micro-batch's examples: a stream gives them, otherwise it is their indices."""
    train = setup.data.train
    return micro_batch if isinstance(train, TrainStream) else list(train.select(micro_batch))


def _batch(setup: Setup, micro_batch: list[Any]) -> dict[str, Tensor]:
    """A micro-batch, on the CPU."""
    return collate(
        _rows(setup, micro_batch),
        pad_token_id=setup.tokenizer.pad_token_id,
        pad_to_multiple_of=setup.data.pad_to_multiple_of,
    )


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
        load_into_model(resumed, trained)
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


def _restore(setup: Setup, schedule: LambdaLR, resumed: Checkpoint) -> TrainState:
    """Optimizer, schedule and generators as they were when the checkpoint was saved."""
    progress = resumed.progress
    # One token: a batch of the data may be the very one that gives no finite loss.
    token = torch.tensor([[setup.tokenizer.eos_token_id]], device=setup.engine.device)
    setup.engine.load_optimizer_state(
        resumed.weights,
        resumed.moments,
        step=progress.step - progress.skipped,
        batch={"input_ids": token, "attention_mask": torch.ones_like(token), "labels": token},
    )
    set_schedule_step(schedule, progress.step)
    setup.engine.load_random_states(resumed.random)
    return progress


def set_schedule_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule where `step` calls of its own `step` would have taken it."""
    schedule.last_epoch = step
    rates = [
        base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _validate(run: _Run, progress: TrainState) -> TrainState:
    setup, name = run.setup, run.setup.task.name
    validated = evaluate(
        setup.engine,
        setup.data.validation,
        task=setup.task,
        tokenizer=setup.tokenizer,
        config=run.config,
        description="validating",
        on_batch_end=run.session.check,
    )
    scores = {**validated.metrics, "loss": validated.loss}
    run.monitor.log(
        progress.step, {f"eval/{name}/{metric}": value for metric, value in scores.items()}
    )
    if (seen := mixture_seen(setup.engine, validated)) is not None:
        setup.engine.on_rank0(
            lambda: run.monitor.mixture(progress.step, *seen), "drawing gates and prompts"
        )
    listed = ", ".join(f"{metric} {value:.4g}" for metric, value in told_once(scores).items())
    run.monitor.message(f"step {progress.step}: validation of {name}: {listed}")
    return progress.measured(validated.metrics["average_metrics"], validated.loss)


def mixture_seen(engine: Engine, evaluated: Evaluation) -> tuple[Tensor, Tensor] | None:
    """Of an evaluation just done, gates [N,L,K] and prompt similarity [1+K,1+K]; None without experts."""
    assert isinstance(engine.module, TrainedT5)
    similarity_MM = engine.module.prompt_similarity()
    if evaluated.gates_NLK is None or similarity_MM is None:
        return None
    return evaluated.gates_NLK, similarity_MM.cpu()
