"""Scores of a task's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pemt.metrics import compute
from pemt.tasks.task import Task, TaskError


def score(
    task: Task, predictions: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The task's metrics in percent, plus `average_metrics`, the mean of their values.

    Args:
        task: names the metrics.
        predictions: generated texts, one per row.
        rows: the examples they belong to, with `references` and `group`.

    Raises TaskError where the numbers of predictions and rows differ.
    """
    if len(predictions) != len(rows):
        raise TaskError(f"task {task.name}: {len(predictions)} predictions for {len(rows)} rows")
    references = [list(row["references"]) for row in rows]
    groups = [str(row["group"]) for row in rows]
    return compute(task.metrics, task.labels, list(predictions), references, groups)
