"""What a task is: one frozen record, and how it turns a row of data into an example.

A row has the fields of the hub's copy of the data set. An example is what the model and the scorer
see: the source text, the target text, every accepted answer, and the group (the question, in
MultiRC) whose examples are split and scored together.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from pemt.config import PemtError
from pemt.tasks.metric_kinds import METRIC_KINDS

Row = Mapping[str, Any]
LONGEST_ERROR = 500
SPLITS = ("train", "validation", "test")
Kind = Literal["classification", "regression", "answer"]


class TaskError(PemtError):
    """A task that does not exist, or whose description is wrong."""


class RowError(ValueError):
    """A row that cannot become an example; the reader adds the file and the line.

    What it tells is one line of UTF-8, whatever stands in the row.
    """

    def __init__(self, told: str) -> None:
        line = " ".join(told.encode("utf-8", errors="backslashreplace").decode("utf-8").split())
        super().__init__(line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}…")


class Example(TypedDict):
    """One example as text. `group` is empty where every example stands alone."""

    source: str
    target: str
    references: list[str]
    group: str


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where the data lives on the hub; None is a split that does not exist or has no labels."""

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = None

    def split_name(self, split: str) -> str | None:
        """The hub's name of "train", "validation" or "test"."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of the task table.

    Required: `name`, `description` (one sentence; the embeddings of its tokens start the task
    prompt), `template` (the source text, `{field}` for a field of the row) and `metrics` (names in
    METRIC_KINDS). A task with `labels` is a classification: `labels` are the target texts
    in the order of the data set's class ids, `label_names` what files may call the same classes.
    Without labels it is an open answer (`label` holds a string or a list of them, the first is the
    target) or, with `score_step`, a regression whose target is `label` rounded to that step.
    """

    name: str
    description: str
    template: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    label: str = "label"
    # Values of the label that mean "no gold label": such rows are dropped and counted.
    no_label: tuple[str, ...] = ()
    score_step: float | None = None
    group: tuple[str, ...] = ()
    # One training example per accepted answer instead of the first answer only.
    train_on_every_answer: bool = False
    max_target_length: int = 16
    hub: HubSource | None = None
    # Published files: other names of a field, and the columns where a file has no header line.
    aliases: tuple[tuple[str, str], ...] = ()
    tsv_columns: tuple[str, ...] = ()
    # (split, path) pairs; a data_dir is not needed then.
    files: tuple[tuple[str, str], ...] = ()
    # A RowError in place of a row that is malformed.
    unpack: Callable[[Row], Iterable[Row | RowError]] | None = None
    # What the template needs, and what label and group need; rows to predict have the former alone.
    prepare: Callable[[Row], Row] | None = None
    prepare_label: Callable[[Row], Row] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRIC_KINDS]
        if unknown or not self.metrics:
            found = ", ".join(unknown) or "none"
            allowed = ", ".join(sorted(METRIC_KINDS))
            raise TaskError(f"task {self.name}: metrics: found {found}; allowed: {allowed}")
        self._check_metrics()
        if self.label_names and len(self.label_names) != len(self.labels):
            raise TaskError(
                f"task {self.name}: label_names has {len(self.label_names)} entries, labels has "
                f"{len(self.labels)}; give one name per label or none"
            )
        if len(set(self.labels)) != len(self.labels):
            raise TaskError(
                f"task {self.name}: labels: a label stands twice in {list(self.labels)}"
            )
        if self.labels and self.score_step is not None:
            raise TaskError(f"task {self.name}: give labels or score_step, not both")
        if not self.fields:
            raise TaskError(f"task {self.name}: template: no {{field}} in {self.template!r}")

    def _check_metrics(self) -> None:
        """Refuse a metric that would fail, or mislead, after the training."""
        labels, grouped = len(self.labels), bool(self.group)
        fitting = [
            name
            for name, metric in METRIC_KINDS.items()
            if metric.fits(self.kind, label_count=labels, by_group=grouped)
        ]
        for name in self.metrics:
            if name not in fitting:
                metric = METRIC_KINDS[name]
                needed = told(metric.kind, metric.label_count, by_group=metric.by_group)
                found = told(self.kind, labels, by_group=grouped)
                raise TaskError(
                    f"task {self.name}: metrics: {name} scores {needed}, found {found}; "
                    f"allowed here: {', '.join(fitting)}"
                )

    @property
    def kind(self) -> Kind:
        """Classification, regression or open answer, from what is given."""
        if self.labels:
            return "classification"
        return "answer" if self.score_step is None else "regression"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the template names."""
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise TaskError(f"task {self.name}: template: {error} in {self.template!r}") from None
        for _, name, spec, conversion in parts:
            plain = name and not (name.isdecimal() or set(name) & set(".[]") or spec or conversion)
            if name is not None and not plain:
                raise TaskError(
                    f"task {self.name}: template: found a field that is no plain {{name}} in "
                    f"{self.template!r}; allowed: {{name}} without number, format, dot or bracket"
                )
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name))


def told(kind: str | None, label_count: int | None, *, by_group: bool) -> str:
    """A kind of task in words."""
    if kind != "classification":
        return "a regression (score_step)" if kind == "regression" else "open answers"
    labels = f" with {label_count} labels" if label_count else ""
    return f"a classification{labels}{' and a group' if by_group else ''}"


def label_name(task: Task, answer: str) -> str | None:
    """What a class is called whose target text this is; None for any other text, and where classes have no names."""
    return dict(zip(task.labels, task.label_names, strict=False)).get(answer)


def class_name(task: Task, label: str) -> str:
    """A label with its name, where it has one: `0 (entailment)`."""
    name = label_name(task, label)
    return label if name is None else f"{label} ({name})"


def example_of(task: Task, row: Row) -> Example | None:
    """The example of a row, or None where the row has no gold label.

    Raises RowError for a missing field, a wrong type, an unknown label or text that is no UTF-8.
    """
    labelled = task.prepare_label(row) if task.prepare_label else row
    answer = field_of(labelled, task.label)
    if is_unlabelled(task, answer):
        return None
    source = source_of(task, row)
    references = [encodable(text) for text in references_of(task, answer)]
    group = "/".join(str(field_of(labelled, name)) for name in task.group)
    return Example(
        source=source, target=references[0], references=references, group=encodable(group)
    )


def has_label(task: Task, row: Row) -> bool:
    """Whether a row says what is right: -1 stands for no label in the hub's test sets."""
    try:
        labelled = task.prepare_label(row) if task.prepare_label else row
        answer = field_of(labelled, task.label)
    except RowError:
        return False
    return not is_unlabelled(task, answer) and "-1" not in spellings(answer)


def source_of(task: Task, row: Row) -> str:
    """The source text of a row, which needs no label.

    Raises RowError for a missing field, a wrong type or text that is no UTF-8.
    """
    row = task.prepare(row) if task.prepare else row
    return encodable(task.template.format_map({name: shown(row, name) for name in task.fields}))


def field_of(row: Row, name: str) -> Any:
    """A field of a row; RowError names the fields that are there."""
    if name not in row or row[name] is None:
        found = ", ".join(str(key) for key in row) or "nothing"
        raise RowError(f"field {name!r} is missing; found: {found}")
    return row[name]


def text_of(row: Row, name: str) -> str:
    """A field that must be a string."""
    value = field_of(row, name)
    if not isinstance(value, str):
        raise RowError(f"field {name!r} must be text, found {type(value).__name__}: {value!r:.60}")
    return value


def shown(row: Row, name: str) -> str:
    """A field as the template shows it: a text, or a number as csv writes it."""
    text = written(field_of(row, name))
    return text_of(row, name) if text is None else text


def written(value: Any) -> str | None:
    """A text, or a finite number as text; None for anything else."""
    if isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and abs(value) < float("inf") else None


def encodable(text: str) -> str:
    """The text, or RowError where JSON's \\ud800 … \\udfff left a half of a character in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"no UTF-8: {text[error.start]!r} is half of a character") from None
    return text


def is_unlabelled(task: Task, answer: Any) -> bool:
    """Whether a row has no gold label: a value of `no_label`, or an empty list of answers."""
    if task.kind == "answer":
        return bool(answer == [])
    return any(text in task.no_label for text in spellings(answer))


def references_of(task: Task, answer: Any) -> list[str]:
    """Every accepted answer as target text, the one to train on first."""
    if task.kind == "classification":
        return [task.labels[class_id(task, answer)]]
    if task.score_step is not None:
        return [score_text(answer, task.score_step)]
    texts = [written(each) for each in (answer if isinstance(answer, list) else [answer])]
    found = [text for text in texts if text is not None]
    if len(found) < len(texts):
        raise RowError(
            f"field {task.label!r} must be text or a list of texts, found {answer!r:.60}"
        )
    return list(dict.fromkeys(found))


def class_id(task: Task, value: Any) -> int:
    """The class that a file means: its name, its target text, its class id, true or false."""
    # With numerals for labels ("1", "2", as in Winogrande) an id would be ambiguous.
    ids = () if task.labels[0].isdecimal() else tuple(map(str, range(len(task.labels))))
    for text in spellings(value):
        for names in (task.label_names, task.labels, ids):
            if text in names:
                return names.index(text)
    if len(task.labels) == 2 and str(value).strip().lower() in ("false", "true"):
        return int(str(value).strip().lower() == "true")
    allowed = ", ".join(dict.fromkeys((*task.labels, *task.label_names)))
    raise RowError(f"field {task.label!r}: unknown label {value!r:.60}; allowed: {allowed}")


def spellings(value: Any) -> tuple[str, str]:
    """A label as text, true as 1; and without the .0 that a column of floats puts behind it."""
    text = str(int(value)) if isinstance(value, bool) else str(value).strip()
    return text, text.removesuffix(".0")


def score_text(value: Any, step: float) -> str:
    """A score rounded to the next step, as T5 does for STS-B (1910.10683, section 2.4)."""
    try:
        steps = round(float(value) / step)  # of NaN a ValueError, of infinity an OverflowError
    except (TypeError, ValueError):
        raise RowError(f"the score must be a number, found {value!r:.60}") from None
    except OverflowError:
        raise RowError(f"the score must be finite, found {value!r:.60}") from None
    return f"{steps * step:.{decimals(step)}f}"


def decimals(step: float) -> int:
    """Digits after the point that a step needs."""
    return len(f"{step:.6f}".rstrip("0").split(".")[1])
