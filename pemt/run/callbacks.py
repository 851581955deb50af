"""A caller's callbacks in transformers' `TrainerCallback` protocol, and what they want of the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from pemt.checkpoint import TrainState
from pemt.config import PemtError
from pemt.engine import Engine
from pemt.monitor import progress_logger

EVENTS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
)
_FLAGS = ("should_training_stop", "should_save", "should_evaluate", "should_log")
TRAIN = "train/"


def checked_callbacks(callbacks: Sequence[Any]) -> list[Any]:
    """A caller's callbacks; of classes, an instance each.

    Raises:
        PemtError: one has no method that is called.
    """
    made = [each() if isinstance(each, type) else each for each in callbacks]
    for each in made:
        if not any(callable(getattr(each, event, None)) for event in EVENTS):
            raise PemtError(f"callbacks: {each!r:.60} has none of the methods {', '.join(EVENTS)}")
    return made


class Callbacks:
    """Calls them on every rank, and has all ranks do what any of them asks for; without any it does nothing.

    `args` is the run's configuration, under transformers' names: its metric for the best model is `average_metrics`,
    the higher the better, and the best one is loaded at the end. Keyword arguments are `model` (a TrainedT5),
    `processing_class`, `optimizer` and `lr_scheduler`.

    Args:
        callbacks: as `checked_callbacks` gives them.
        engine: holds the model, after `prepare`, and the configuration.
        tokenizer: the base model's.
        schedule: of the learning rate.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        schedule: Any,
        total_steps: int,
    ) -> None:
        self._callbacks = callbacks
        self._engine, self._tokenizer, self._schedule = engine, tokenizer, schedule
        self.args = args = SimpleNamespace(
            **vars(engine.config),
            load_best_model_at_end=True,
            metric_for_best_model="average_metrics",
            greater_is_better=True,
        )
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=total_steps,
            num_train_epochs=args.num_train_epochs,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.per_device_train_batch_size,
            is_world_process_zero=engine.is_main,
            is_local_process_zero=engine.is_local_main,
        )
        if engine.is_main:
            self._warn_of_unsupported()

    def at(self, train_state: TrainState, epoch: float) -> None:
        """The step that the loop has come to."""
        state = self.state
        state.global_step, state.epoch = train_state.step, epoch
        state.best_metric, state.best_global_step = train_state.best_metric, train_state.best_step
        if train_state.best_step is not None:
            state.best_model_checkpoint = (
                f"{self.args.output_dir}/checkpoint-{train_state.best_step}"
            )

    def next_step(self) -> None:
        """Forget what was wanted of the last one."""
        control = self.control
        control.should_save = control.should_evaluate = control.should_log = False
        self.call("on_step_begin")

    def log(self, scalars: Mapping[str, float]) -> None:
        """What the run has just logged; `train/loss` is `loss` to them, as it is transformers'."""
        if self._callbacks:
            logs = {name.removeprefix(TRAIN): value for name, value in scalars.items()}
            self.state.log_history.append({**logs, "step": self.state.global_step})
            self.call("on_log", logs=logs)

    def call(self, event: str, **given: Any) -> None:
        """One event (all ranks call)."""
        if not self._callbacks:
            return
        for each in self._callbacks:
            if (method := getattr(each, event, None)) is None:
                continue
            changed = method(
                self.args,
                self.state,
                self.control,
                model=self._engine.module,
                processing_class=self._tokenizer,
                optimizer=self._engine.optimizer,
                lr_scheduler=self._schedule,
                **given,
            )
            self.control = changed or self.control
        self._agree()

    def _agree(self) -> None:
        """What any rank's callbacks want is done by all."""
        control = self.control
        if control.should_epoch_stop:
            raise PemtError(
                "callbacks: should_epoch_stop is set, and this loop has no epochs to leave; set should_training_stop"
            )
        wanted = self._engine.totals([int(getattr(control, flag)) for flag in _FLAGS])
        for flag, count in zip(_FLAGS, wanted, strict=True):
            setattr(control, flag, count > 0)

    def _warn_of_unsupported(self) -> None:
        known = {
            name: each for name, each in vars(TrainerCallback).items() if name.startswith("on_")
        }
        for each in self._callbacks:
            own = [
                name
                for name, inherited in known.items()
                if name not in EVENTS and getattr(type(each), name, None) not in (None, inherited)
            ]
            if own:
                progress_logger().info(
                    f"callbacks: {type(each).__name__}.{', '.join(own)} are not called; called are "
                    f"{', '.join(EVENTS)}"
                )
