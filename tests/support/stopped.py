"""Runs one configuration again and again, told to stop in every step, until it is finished.

In each step one rank gets SIGTERM after its first micro-batch; and in each validation once, in the
middle.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from pemt.config.schema import AdaptConfig
from pemt.engine import Engine
from pemt.engine.signals import Interrupted
from pemt.run import evaluate
from pemt.run.train import run_adapt


def stopped_at_every_step(config: AdaptConfig) -> list[str]:
    """Train to the end; where the run was stopped on the way."""
    stops: list[str] = []
    while True:
        try:
            with stopped_once(stops):
                run_adapt(config)
        except Interrupted:
            continue
        return stops


@contextmanager
def stopped_once(stops: list[str]) -> Iterator[None]:
    """SIGTERM to one rank in the first step, or in the first validation unless the last stop was there."""
    backward, measure = Engine.backward, evaluate._measure
    before = len(stops)

    def stop(where: str, engine: Engine) -> None:
        if len(stops) > before or (where == "validation" and stops[-1:] == [where]):
            return
        stops.append(where)  # on every rank
        if engine.rank == len(stops) % engine.world_size:
            os.kill(os.getpid(), signal.SIGTERM)

    def backward_and_stop(engine: Engine, loss: Any, *, last: bool) -> None:
        backward(engine, loss, last=last)
        # The backward pass that makes a resumed optimizer's states is none of a step.
        if loss.detach() > 0:
            stop("step", engine)

    def measure_and_stop(engine: Engine, *arguments: Any, **fields: Any) -> Any:
        stop("validation", engine)
        return measure(engine, *arguments, **fields)

    with (
        mock.patch.object(Engine, "backward", backward_and_stop),
        mock.patch.object(evaluate, "_measure", measure_and_stop),
    ):
        yield


class Stops:
    """Told to stop after the second step, as by a cluster."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
