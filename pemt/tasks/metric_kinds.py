"""What each metric asks of a task, by its name.

`metrics.py` computes them, with libraries that take seconds to import; a task is described without these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MetricKind:
    """What a metric asks of a task: its kind, its number of labels, and that it has a group.

    None and False ask nothing.
    """

    kind: str | None = None
    label_count: int | None = None
    by_group: bool = False

    def fits(self, kind: str, *, label_count: int, by_group: bool) -> bool:
        """Whether it can score such a task."""
        return (
            self.kind in (None, kind)
            and self.label_count in (None, label_count)
            and (by_group or not self.by_group)
        )


METRIC_KINDS = {
    "accuracy": MetricKind(),
    "f1": MetricKind(kind="classification", label_count=2),
    "macro_f1": MetricKind(kind="classification"),
    "matthews": MetricKind(kind="classification"),
    "pearson_spearman": MetricKind(kind="regression"),
    "squad": MetricKind(kind="answer"),
    "multirc": MetricKind(kind="classification", label_count=2, by_group=True),
}
