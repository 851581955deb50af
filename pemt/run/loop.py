"""The training loop of both stages: flat, from the first step or a checkpoint's, to the best weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pemt.checkpoint import Checkpoint, Checkpoints, TrainState
from pemt.config import TENSORBOARD, spell_fields
from pemt.data import TrainStream, collate, to_device
from pemt.engine import Engine, Interrupted, full_size
from pemt.model import TrainedT5
from pemt.monitor import Monitor
from pemt.run.callbacks import Callbacks
from pemt.run.evaluate import evaluate_set, gates_and_similarity
from pemt.run.meter import Meter, micro_batch_weights
from pemt.run.nan_guard import NonFiniteGuard
from pemt.run.prepare import (
    Batches,
    Setup,
    open_all_trackers,
    open_run,
    prepare,
    restore,
    total_steps_of,
    train_batches,
    warmup_notes,
)
from pemt.run.session import Session
from pemt.storage import TensorFile
from pemt.tasks import without_redundant_mean


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What training leaves.

    Args:
        weights: the best checkpoint's trained weights, fp32, by parameter name, in their file.
        state: the last step, and the best one.
        epoch: passes over the training data.
    """

    weights: TensorFile
    state: TrainState
    epoch: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same from step to step."""

    setup: Setup
    session: Session
    checkpoints: Checkpoints
    monitor: Monitor
    batches: Batches
    total_steps: int
    callbacks: Callbacks

    def is_epoch_end(self, step: int) -> bool:
        """Whether this step is an epoch's last, or the run's."""
        per_epoch = self.batches.steps_per_epoch
        return step == self.total_steps or (per_epoch is not None and step % per_epoch == 0)

    def should_stop(self, step: int) -> bool:
        """The last step, or the one after which a callback stops the run."""
        return step == self.total_steps or self.callbacks.control.should_training_stop

    def should_evaluate(self, step: int) -> bool:
        """As often as was configured, at the end, and where a callback wants it."""
        if step == 0:
            return False
        if self.callbacks.control.should_evaluate or (
            self.should_stop(step) and self.setup.config.eval_strategy != "no"
        ):
            return True
        interval = self.setup.config.eval_steps
        if interval is not None:
            return step % interval == 0
        return self.setup.config.eval_strategy == "epoch" and self.is_epoch_end(step)

    def should_save(self, step: int) -> bool:
        """After each validation, or after each epoch where there is none; and as often as was asked for."""
        interval = self.setup.config.save_steps
        return (
            self.should_evaluate(step)
            or self.callbacks.control.should_save
            or self.should_stop(step)
            or (interval is not None and step % interval == 0)
            or (self.setup.config.eval_strategy == "no" and self.is_epoch_end(step))
        )


def fit(setup: Setup, session: Session) -> FitResult:
    """Train, validate and save until the configured end (all ranks call).

    `open_run` finds the checkpoint, `prepare` loads its weights, `restore` its optimizer, `_train` takes the steps.

    Args:
        setup: the run; its model is not yet prepared, and a checkpoint of one stage is refused by the other.
        session: tells when to stop.

    Raises:
        PemtError: the run cannot start, resume, or write its files.
        Interrupted: a rank was told to stop; what was trained is saved.
    """
    config, engine, built = setup.config, setup.engine, setup.built
    checkpoints, resumed = open_run(setup, session)
    batches = train_batches(setup, resumed.state.position if resumed else None)
    total_steps = total_steps_of(config, batches)
    schedule = prepare(config, engine, built.model, resumed, total_steps=total_steps)
    callbacks = Callbacks(setup.caller.callbacks, engine, setup.tokenizer, schedule, total_steps)
    state = restore(setup, schedule, resumed) if resumed else TrainState()
    session.set_step(state.step)
    with (
        Monitor(
            Path(config.output_dir),
            total_steps=total_steps,
            initial_step=state.step,
            is_main=engine.is_main,
            description=f"{built.stage} {setup.task.name}",
            gates=built.gate_names,
            tensorboard=TENSORBOARD in config.report_to,
            trackers=open_all_trackers(engine),
        ) as monitor,
        checkpoints,
    ):
        run = Run(
            setup=setup,
            session=session,
            checkpoints=checkpoints,
            monitor=monitor,
            batches=batches,
            total_steps=total_steps,
            callbacks=callbacks,
        )
        _log_config(run, resumed)
        state = _train(run, schedule, state)
    best = checkpoints.best_weights(state)
    return FitResult(weights=best, state=state, epoch=batches.epochs_at(state.step))


def _log_config(run: Run, resumed: Checkpoint | None) -> None:
    """What this run is, to the logs and the terminal."""
    monitor, setup, engine = run.monitor, run.setup, run.setup.engine
    size = _size_line(setup.built.model, engine)
    with engine.together("opening the logs"):  # rank 0 alone has some
        monitor.log_config(setup.config, {"job": size, "device": str(engine.device)})
    warmup = warmup_notes(setup.config, run.total_steps)
    notes = (*setup.caller.notes, *setup.data.notes)
    for line in (size, *(resumed.notes if resumed else ()), *notes, *warmup):
        monitor.message(spell_fields(line))
    if resumed:
        step = resumed.state.step
        monitor.message(f"resuming from step {step}/{run.total_steps}: {resumed.folder}")


def _size_line(model: TrainedT5, engine: Engine) -> str:
    trained = sum(full_size(parameter) for _, parameter in model.trainable_parameters())
    total = sum(full_size(parameter) for parameter in model.parameters())
    config = engine.config
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    stage = "no DeepSpeed" if engine.zero_stage is None else f"ZeRO-{engine.zero_stage}"
    return (
        f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}); "
        f"{engine.world_size} rank(s), {stage}, {engine.precision}; a step takes {batch * engine.world_size} examples, "
        f"a checkpoint {12 * trained / 1e6:,.1f} MB"
    )


def _train(run: Run, schedule: LambdaLR, state: TrainState) -> TrainState:
    """Every step that is left, and what is due after each."""
    setup, config, batches = run.setup, run.setup.config, run.batches
    callbacks, epoch_at = run.callbacks, batches.epochs_at
    setup.built.model.train()
    callbacks.at(state, epoch_at(state.step))
    callbacks.call("on_train_begin")
    if run.should_evaluate(state.step) and state.validated_step != state.step:
        state = _evaluate_and_save(run, state)  # it was stopped before this validation
    meter = Meter(setup.engine)
    guard = NonFiniteGuard(setup.engine, partial(_rows, setup), log=run.monitor.message)
    last = run.total_steps if state.ended is None else state.step
    for micro_batches in batches.steps(state.step, last):
        if callbacks.control.should_training_stop:
            break
        if state.step == 0 or run.is_epoch_end(state.step):
            callbacks.call("on_epoch_begin")
        callbacks.next_step()
        step_scalars, losses = _take_step(setup, schedule, meter, micro_batches)
        step, norm = state.step + 1, step_scalars["train/grad_norm"]
        skipped = state.skipped + guard.check(step, norm, micro_batches, losses)
        state = replace(state, step=step, skipped=skipped, position=batches.position())
        run.session.set_step(step)
        callbacks.at(state, epoch_at(step))
        callbacks.call("on_step_end")
        is_due = step % config.logging_steps == 0 or callbacks.control.should_log
        if is_due or run.should_stop(step):
            _log_step(run, meter, step, {**step_scalars, "train/skipped_steps": skipped})
        with meter.paused():
            state = _evaluate_and_save(run, state)
        if run.is_epoch_end(step):
            callbacks.call("on_epoch_end")
    if state.step < run.total_steps:
        state = _end_early(run, state)
    _wait_for_saves(run)
    callbacks.call("on_train_end")
    return state


def _take_step(
    setup: Setup, schedule: LambdaLR, meter: Meter, micro_batches: list[list[Any]]
) -> tuple[dict[str, float], list[Tensor]]:
    """One optimizer step over this rank's micro-batches: its learning rate and gradient norm, and their losses."""
    engine = setup.engine
    assert isinstance(engine.module, TrainedT5)
    sparsity_weight, losses = engine.module.sparsity_loss_weight, []
    batches = [_batch(setup, indices) for indices in micro_batches]
    weights = micro_batch_weights(engine, batches)
    for number, (batch, weight) in enumerate(zip(batches, weights, strict=True), start=1):
        out = engine.model(**to_device(batch, engine.device))
        step_loss = weight.of_loss(out, sparsity_weight)
        engine.backward(step_loss, last=number == len(batches))
        meter.add(out, batch, weight, step_loss)
        losses.append(out.loss.detach())
    learning_rate = float(schedule.get_last_lr()[0])
    grad_norm = engine.step()
    schedule.step()
    return {"train/learning_rate": learning_rate, "train/grad_norm": grad_norm}, losses


def _batch(setup: Setup, micro_batch: list[Any]) -> dict[str, Tensor]:
    """A micro-batch, on the CPU: its tokens are counted there, so that no device is waited for."""
    return collate(
        _rows(setup, micro_batch),
        pad_token_id=setup.tokenizer.pad_token_id,
        pad_to_multiple_of=setup.config.pad_to_multiple_of,
    )


def _rows(setup: Setup, micro_batch: list[Any]) -> list[dict[str, Any]]:
    """A micro-batch's examples: a stream gives them, otherwise it is their indices."""
    train = setup.data.train
    return micro_batch if isinstance(train, TrainStream) else [train[i] for i in micro_batch]


def _log_step(run: Run, meter: Meter, step: int, step_scalars: dict[str, float]) -> None:
    """What the steps since the last report gave, to the logs and the bar (all ranks call)."""
    scalars, gates_LK = meter.read()
    scalars |= {**step_scalars, "train/epoch": run.batches.epochs_at(step)}
    if gates_LK is not None:
        scalars |= run.setup.built.gate_names.scalars(gates_LK)
    run.monitor.log(step, scalars)
    run.callbacks.log(scalars)
    run.monitor.advance(
        step, loss=scalars["train/loss"], samples_per_second=scalars["train/samples_per_second"]
    )
    for line in run.batches.notes(at_end=step == run.total_steps):
        run.monitor.message(line)


def _evaluate_and_save(run: Run, state: TrainState) -> TrainState:
    """Validate and save where it is due; save and exit where a rank was told to stop."""
    _log_saves(run)
    try:
        run.session.raise_if_stopped()
        if run.should_evaluate(state.step):
            state = _evaluate(run, state)
    except Interrupted:
        run.checkpoints.save(state)
        _wait_for_saves(run)
        raise
    if run.should_stop(state.step) and state.step < run.total_steps:
        state = replace(state, ended=state.step)
    if run.should_save(state.step):
        run.checkpoints.save(state)
        run.callbacks.call("on_save")
    return state


def _evaluate(run: Run, state: TrainState) -> TrainState:
    setup, name = run.setup, run.setup.task.name
    validated = evaluate_set(setup, setup.data.validation, "validating", run.session)
    scores = {**validated.metrics, "loss": validated.loss}
    run.monitor.log(
        state.step, {f"eval/{name}/{metric}": value for metric, value in scores.items()}
    )
    if (seen := gates_and_similarity(setup.engine, validated)) is not None:
        setup.engine.on_rank0(
            lambda: run.monitor.log_mixture(state.step, *seen), "drawing gates and prompts"
        )
    listed = ", ".join(
        f"{metric} {value:.4g}" for metric, value in without_redundant_mean(scores).items()
    )
    run.monitor.message(f"step {state.step}: validation of {name}: {listed}")
    # with the best one before this: that is what they compare with
    run.callbacks.call(
        "on_evaluate", metrics={f"eval_{metric}": value for metric, value in scores.items()}
    )
    state = state.measured(validated.metrics["average_metrics"], validated.loss)
    run.callbacks.at(state, run.batches.epochs_at(state.step))
    return state


def _log_saves(run: Run) -> None:
    for line in run.checkpoints.lines():
        run.monitor.message(line)


def _wait_for_saves(run: Run) -> None:
    try:
        run.checkpoints.finish()
    finally:
        _log_saves(run)


def _end_early(run: Run, state: TrainState) -> TrainState:
    """The end that a callback has asked for, saved as such, so that it is the end where the run resumes, too."""
    run.monitor.message(
        f"stopped by a callback after step {state.step} of {run.total_steps}; best weights and test follow"
    )
    for line in run.batches.notes(at_end=True):
        run.monitor.message(line)
    if state.ended is None:
        state = replace(state, ended=state.step)
        run.checkpoints.save(state)
    return state
