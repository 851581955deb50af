"""What a Python caller gives a run besides its configuration: data, task, metrics, callbacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from datasets.fingerprint import Hasher

from pemt.config import PemtError, RunConfig
from pemt.data import DataError, MemoryData, Rows, memory_data
from pemt.engine import Engine
from pemt.run.callbacks import checked_callbacks
from pemt.run.early import check_nothing_given
from pemt.tasks import Metric, Task, TaskError, get_task, task_names, task_text

Config = TypeVar("Config", bound=RunConfig)
TEXT_COLUMNS = ("source", "target")


@dataclass(frozen=True, kw_only=True)
class CallerInputs:
    """What a Python caller gives beside the configuration.

    Args:
        task: None where the configuration names it.
        data: None where the configuration says where they lie.
        metrics: by name.
        callbacks: objects with methods of transformers' `TrainerCallback`.
        notes: in one line each, what was decided.
        fingerprint: of data and task; None where neither was given.
    """

    task: Task | None = None
    data: MemoryData | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str | None = None

    def check_results(self, config: RunConfig, results: Mapping[str, Any]) -> None:
        """Refuse the results of a run that finished before it was asked for these metrics.

        Raises:
            PemtError: a metric is not among them.
        """
        missing = [name for name in self.metrics if f"test_{name}" not in results]
        if missing:
            raise PemtError(
                f"metrics: {config.output_dir} holds this run, finished, without {', '.join(missing)}; score it with "
                "evaluate_run(..., metrics=...), or train it again with --overwrite_output_dir true"
            )


def with_caller_inputs(
    config: Config,
    train: Rows | Mapping[str, Rows] | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    task: Task | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Sequence[Any] = (),
) -> tuple[Config, CallerInputs]:
    """What a caller has given, and the configuration with its fingerprint: another one is another run.

    Raises:
        DataError: the data are no rows, or the configuration names others too; or this is a run whose data were given
            in Python, and they are not.
        TaskError: the task is another than the configuration names.
    """
    data = memory_data(train, validation, test)
    caller = CallerInputs(metrics=dict(metrics or {}), callbacks=checked_callbacks(callbacks))
    if data is None and task is None:
        check_nothing_given(config)
        return config, caller
    if data is not None:
        for name in ("data_dir", "streaming"):
            if value := getattr(config, name):
                raise DataError(
                    f"{name}: found {value}, but the data are given in memory; leave one of them out"
                )
    chosen, notes = _task(config, task, data)
    # A known task is what its name says. Pickles of equal tasks may differ, so the text comes first.
    own = None if task is None else task_text(task) or Hasher.hash(task)
    content = json.dumps([own, {} if data is None else data.digests], sort_keys=True)
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    caller = replace(caller, task=chosen, data=data, notes=notes, fingerprint=fingerprint)
    return replace(config, data_fingerprint=fingerprint), caller


def check_same_on_all(caller: CallerInputs, engine: Engine) -> None:
    """Refuse ranks that were given different data (all ranks call).

    Raises:
        DataError: they were.
    """
    # Not the configuration's: that is rank 0's on every rank.
    found = engine.all_gather_object(caller.fingerprint)
    other = [rank for rank, each in enumerate(found) if each != found[0]]
    if other:
        raise DataError(
            f"train: rank {other[0]} was given other data, or another task, than rank 0; give all ranks the same rows, "
            "in the same order: each takes its own share"
        )


def _task(
    config: RunConfig, task: Task | None, data: MemoryData | None
) -> tuple[Task, tuple[str, ...]]:
    if task is not None:
        if task.name != config.task_name:
            raise TaskError(
                f"task_name: found {config.task_name!r}, but the task given is {task.name!r}; give the same name"
            )
        if config.task_file is not None:
            raise TaskError("task_file: given beside a task; leave one of them out")
        if task_text(task) is None and task.name not in task_names():
            return task, (
                f"{task.name}: the task has functions, which no file can hold; predict and evaluate of this run "
                "know it where pemt.tasks.register_task has been called with it",
            )
        return task, ()
    is_known = config.task_file is not None or config.task_name in task_names()
    if is_known or data is None or not data.has_columns(*TEXT_COLUMNS):
        try:
            return get_task(config.task_name, config.task_file), ()
        except TaskError as error:
            raise TaskError(
                f"{error}; in Python give task=Task(...), or rows with the columns source and target"
            ) from None
    own = Task(
        name=config.task_name,
        description=config.task_name,
        template="{source}",
        label="target",
        metrics=("accuracy",),
    )
    notes = [
        f"{own.name}: no task of that name; column source is what is read, target what is to be answered, and accuracy "
        "is the share of answers equal to it; task=Task(...) has labels, a template, metrics"
    ]
    if getattr(config, "description", None) is None:
        notes.append(
            f"description: none is given; the prompt starts as the task's name, {own.name!r}"
        )
    return own, tuple(notes)
