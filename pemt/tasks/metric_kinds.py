"""What each metric asks of a task, by its name.

`metrics.py` computes them, with libraries that take seconds to import; a task is described without these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskShape:
    """A task's kind, its number of labels and whether it has a group; or what a metric asks of these.

    None and False ask nothing.
    """

    kind: str | None = None
    label_count: int | None = None
    by_group: bool = False

    def fits(self, task: TaskShape) -> bool:
        """Whether a metric that asks for this can score such a task."""
        return (
            self.kind in (None, task.kind)
            and self.label_count in (None, task.label_count)
            and (task.by_group or not self.by_group)
        )

    def __str__(self) -> str:
        if self.kind != "classification":
            return "a regression (score_step)" if self.kind == "regression" else "open answers"
        labels = f" with {self.label_count} labels" if self.label_count else ""
        return f"a classification{labels}{' and a group' if self.by_group else ''}"


METRIC_KINDS = {
    "accuracy": TaskShape(),
    "f1": TaskShape(kind="classification", label_count=2),
    "macro_f1": TaskShape(kind="classification"),
    "matthews": TaskShape(kind="classification"),
    "pearson_spearman": TaskShape(kind="regression"),
    "squad": TaskShape(kind="answer"),
    "multirc": TaskShape(kind="classification", label_count=2, by_group=True),
}
