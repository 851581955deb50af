"""Scores of a task's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from pemt.tasks.metrics import METRICS, Answers, compute
from pemt.tasks.task import Task, TaskError

_NO_METRICS = ("average_metrics", "loss", "runtime", "samples_per_second")
# Of a Python caller: predictions, and what is right (texts; lists of texts where some example accepts several), to
# a number that is the higher the better.
Metric: TypeAlias = Callable[[list[str], Any], float]


def score(
    task: Task,
    predictions: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    custom: Mapping[str, Metric] | None = None,
) -> dict[str, float]:
    """The task's metrics in percent, plus `average_metrics`, the mean of their values.

    Args:
        task: names the metrics.
        predictions: generated texts, one per row.
        rows: the examples they belong to, with `references` and `group`.
        custom: a caller's own metrics, by name. They stand beside the task's, and `average_metrics` is theirs alone.

    Raises TaskError where the numbers of predictions and rows differ, or where one of the caller's fails or gives no
    finite number.
    """
    if len(predictions) != len(rows):
        raise TaskError(f"task {task.name}: {len(predictions)} predictions for {len(rows)} rows")
    references = [list(row["references"]) for row in rows]
    groups = [str(row["group"]) for row in rows]
    scores = compute(task.metrics, task.labels, list(predictions), references, groups)
    if not custom:
        return scores
    single = all(len(each) == 1 for each in references)
    right = [each[0] for each in references] if single else references
    own = {name: _custom_score(name, custom[name], list(predictions), right) for name in custom}
    return {**scores, **own, "average_metrics": sum(own.values()) / len(own)}


def check_metrics(task: Task, custom: Mapping[str, Metric]) -> None:
    """Refuse a caller's metric that nothing can call, or whose name a score of the task has already.

    Raises TaskError.
    """
    taken = {*compute(task.metrics, task.labels, [], [], []), *_NO_METRICS, "examples"}
    for name, metric in custom.items():
        if not callable(metric):
            raise TaskError(
                f"metrics: {name}: found {metric!r:.60}, a function of (predictions, references) is needed"
            )
        if not isinstance(name, str) or name in taken or not name.replace("_", "").isalnum():
            raise TaskError(
                f"metrics: found the name {name!r}; a name has letters, digits and underscores, and is none of "
                f"{', '.join(sorted(taken))}"
            )


def _custom_score(name: str, metric: Metric, predictions: list[str], references: Any) -> float:
    try:
        number = float(metric(predictions, references))
    except Exception as error:  # whatever a caller's function raises, on rank 0 alone
        raise TaskError(
            f"metrics: {name} failed on {len(predictions)} predictions: {type(error).__name__}: {error}; it gets two "
            "lists of texts and gives a number"
        ) from error
    if not math.isfinite(number):
        raise TaskError(f"metrics: {name} gave {number}, a finite number is needed")
    return number


def without_redundant_mean(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores to be read by people: without `average_metrics` where it is the mean of one metric."""
    several = len(metrics_of(scores)) != 1
    return {name: value for name, value in scores.items() if name != "average_metrics" or several}


def metrics_of(scores: Mapping[str, float]) -> dict[str, float]:
    """Of what an evaluation gives, the metrics alone: no mean of them, loss, time or gate."""
    return {
        name: value
        for name, value in scores.items()
        if name not in _NO_METRICS and not name.startswith("moe_weight_")
    }


def example_scores(task: Task, prediction: str, references: Sequence[str]) -> dict[str, float]:
    """What one example alone scores, 0 to 100: its accuracy, or exact match and F1 of an open answer.

    Empty for a regression, whose correlations no example has alone.
    """
    if task.kind == "classification" or "accuracy" in task.metrics:
        metric = "accuracy"
    elif task.kind == "answer":
        metric = "squad"
    else:
        return {}
    return METRICS[metric](
        Answers(predictions=[prediction], references=[list(references)], groups=[""], labels=())
    )
