"""A run under way: what stays the same from step to step, and what is due after which."""

from __future__ import annotations

from dataclasses import dataclass

from pemt.checkpoint import Checkpoints
from pemt.monitor import Monitor
from pemt.run.callbacks import Callbacks
from pemt.run.prepare import Batches, Setup
from pemt.run.session import Session


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
