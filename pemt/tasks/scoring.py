"""Scores of a task's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pemt.tasks.metrics import best, compute, exact_match, token_f1
from pemt.tasks.task import Task, TaskError

_NO_METRICS = ("average_metrics", "loss", "runtime", "samples_per_second")


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


def told_once(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores to be read by people: without `average_metrics` where it is the mean of one metric."""
    metrics = [
        name for name in scores if name not in _NO_METRICS and not name.startswith("moe_weight_")
    ]
    return {
        name: value
        for name, value in scores.items()
        if name != "average_metrics" or len(metrics) != 1
    }


def example_scores(task: Task, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """What one example alone scores, 0 to 100: its accuracy, or exact match and F1 of an open answer.

    Empty for a regression, whose correlations no example has alone.
    """
    if task.kind == "classification" or "accuracy" in task.metrics:
        return {"accuracy": 100.0 * (prediction.strip() == references[0].strip())}
    if task.kind == "answer":
        return {
            "exact_match": 100 * best(exact_match, prediction, references),
            "f1": 100 * best(token_f1, prediction, references),
        }
    return {}
