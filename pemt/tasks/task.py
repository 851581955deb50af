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
from pemt.tasks.metric_kinds import METRIC_KINDS, TaskShape
from pemt.tasks.values import RowError, class_of, encodable, is_one_of, number_of, plain, written

Row = Mapping[str, Any]
SPLITS = ("train", "validation", "test")
Kind = Literal["classification", "regression", "answer"]
DEFAULT_TARGET_LENGTH = 16


class TaskError(PemtError):
    """A task that does not exist, or whose description is wrong."""


class Example(TypedDict):
    """One example as text. `group` is empty where every example stands alone; with `is_class_id` the label is a number
    that nothing but the order of the task's labels gives a meaning.
    """

    source: str
    target: str
    references: list[str]
    group: str
    is_class_id: bool


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where the data lives on the hub; None is a split that does not exist or has no labels."""

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = "validation"
    test: str | None = None


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
    # In tokens; default: 16, and of open answers what their data need.
    max_target_length: int | None = None
    hub: HubSource | None = None
    # Published files: other names of a field, and the columns where a table has no header line (the
    # first of them where it has fewer).
    aliases: tuple[tuple[str, str], ...] = ()
    tsv_columns: tuple[str, ...] = ()
    # Whether quotes in a table are syntax ("minimal") or text ("none"); None: what the file shows.
    quoting: str | None = None
    # (split, path) pairs; a data_dir is not needed then.
    files: tuple[tuple[str, str], ...] = ()
    # The share of the training examples that become validation and test where there is neither.
    validation_split: float | None = None
    # A RowError in place of a row that is malformed.
    unpack: Callable[[Row], Iterable[Row | RowError]] | None = None
    # What the template needs, and what label and group need; rows to predict have the former alone.
    prepare: Callable[[Row], Row] | None = None
    prepare_label: Callable[[Row], Row] | None = None

    def __post_init__(self) -> None:
        self._check_metrics()
        if self.max_target_length is None and self.kind != "answer":
            object.__setattr__(self, "max_target_length", DEFAULT_TARGET_LENGTH)
        self._check_labels()
        if self.labels and self.score_step is not None:
            raise TaskError(f"task {self.name}: give labels or score_step, not both")
        if not self.fields:
            raise TaskError(f"task {self.name}: template: no {{field}} in {self.template!r}")

    def _check_metrics(self) -> None:
        """Refuse a metric that is not known, or would fail, or mislead, after the training."""
        unknown = [name for name in self.metrics if name not in METRIC_KINDS]
        if unknown or not self.metrics:
            found = ", ".join(unknown) or "none"
            allowed = ", ".join(sorted(METRIC_KINDS))
            raise TaskError(f"task {self.name}: metrics: found {found}; allowed: {allowed}")
        shape = TaskShape(kind=self.kind, label_count=len(self.labels), by_group=bool(self.group))
        fitting = [name for name, needed in METRIC_KINDS.items() if needed.fits(shape)]
        for name in self.metrics:
            if name not in fitting:
                raise TaskError(
                    f"task {self.name}: metrics: {name} scores {METRIC_KINDS[name]}, found {shape}; "
                    f"allowed here: {', '.join(fitting)}"
                )

    def _check_labels(self) -> None:
        """Refuse labels that are no texts, and a text that means two classes."""
        for key in ("labels", "label_names"):
            texts = getattr(self, key)
            for text in texts:
                if not isinstance(text, str):
                    raise TaskError(
                        f"task {self.name}: {key}: found {text!r}, a {type(text).__name__}; give texts, in quotes"
                    )
            if len(set(texts)) != len(texts):
                raise TaskError(f"task {self.name}: {key}: duplicate label in {list(texts)}")
        if not self.label_names:
            return
        if len(self.label_names) != len(self.labels):
            raise TaskError(
                f"task {self.name}: label_names has {len(self.label_names)} entries, labels has "
                f"{len(self.labels)}; give one name per label or none"
            )
        for name, label in zip(self.label_names, self.labels, strict=True):
            if name != label and name in self.labels:
                raise TaskError(
                    f"task {self.name}: label_names: {name!r} is what files call {label!r}, and a label of another "
                    "class itself; a row with it could mean either: give other labels"
                )

    @property
    def kind(self) -> Kind:
        """Classification, regression or open answer, from what is given."""
        if self.labels:
            return "classification"
        return "answer" if self.score_step is None else "regression"

    @property
    def name_of_label(self) -> dict[str, str]:
        """Each class by its target text: its name, or that text itself where classes have no names."""
        return dict(zip(self.labels, self.label_names or self.labels, strict=True))

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


def longest_target(task: Task, given: int | None) -> int:
    """The tokens that a target and an answer may have: those given, else the task's own."""
    return given or task.max_target_length or DEFAULT_TARGET_LENGTH


def label_with_name(task: Task, label: str) -> str:
    """A label with its name, where it has one: `0 (entailment)`."""
    return f"{label} ({task.name_of_label[label]})" if task.label_names else label


def example_of(task: Task, row: Row) -> Example | None:
    """The example of a row, or None where the row has no gold label.

    Raises RowError for a missing field, a wrong type, an unknown label or text that is no UTF-8.
    """
    labelled = task.prepare_label(row) if task.prepare_label else row
    if "null" in task.no_label and task.label in labelled and labelled[task.label] is None:
        return None
    answer = field_of(labelled, task.label)
    if is_unlabelled(task, answer):
        return None
    source = source_of(task, row)
    texts, is_class_id = references_of(task, answer)
    references = [encodable(text) for text in texts]
    group = "/".join(str(field_of(labelled, name)) for name in task.group)
    return Example(
        source=source,
        target=references[0],
        references=references,
        group=encodable(group),
        is_class_id=is_class_id,
    )


def has_label(task: Task, row: Row) -> bool:
    """Whether a row says what is right: -1 stands for no label in the hub's test sets."""
    try:
        labelled = task.prepare_label(row) if task.prepare_label else row
        answer = field_of(labelled, task.label)
    except RowError:
        return False
    is_nothing = answer != answer or is_one_of(answer, ("-1",))  # NaN is pandas' null
    return not is_unlabelled(task, answer) and not is_nothing


def source_of(task: Task, row: Row) -> str:
    """The source text of a row, which needs no label.

    Raises RowError for a missing field, a wrong type or text that is no UTF-8.
    """
    row = task.prepare(row) if task.prepare else row
    return encodable(task.template.format_map({name: shown(row, name) for name in task.fields}))


def field_of(row: Row, name: str) -> Any:
    """A field of a row, as a value of Python's own; RowError names the fields that are there."""
    value = plain(row[name]) if name in row else None
    if value is None:
        found = ", ".join(str(key) for key in row) or "nothing"
        null = " (it is null)" if name in row else ""
        raise RowError(f"field {name!r} is missing{null}; found: {found}")
    return value


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


def is_unlabelled(task: Task, answer: Any) -> bool:
    """Whether a row has no gold label: a value of `no_label`, or an empty list of answers."""
    if task.kind == "answer":
        return bool(answer == [])
    return is_one_of(answer, task.no_label)


def references_of(task: Task, answer: Any) -> tuple[list[str], bool]:
    """Every accepted answer as target text, the one to train on first; and whether it is a class by its place alone."""
    if task.kind == "classification":
        try:
            number, is_class_id = class_of(answer, task.labels, task.label_names)
        except RowError as error:
            raise RowError(f"field {task.label!r}: {error}") from None
        return [task.labels[number]], is_class_id
    if task.score_step is not None:
        return [score_text(answer, task.score_step)], False
    texts = [written(each) for each in (answer if isinstance(answer, list) else [answer])]
    found = [text for text in texts if text is not None]
    if len(found) < len(texts):
        raise RowError(
            f"field {task.label!r} must be text or a list of texts, found {answer!r:.60}"
        )
    return list(dict.fromkeys(found)), False


def score_text(value: Any, step: float) -> str:
    """A score rounded to the next step, as T5 does for STS-B (1910.10683, section 2.4)."""
    number = number_of(value.strip()) if isinstance(value, str) else value
    try:
        if number is None or isinstance(number, bool):
            raise TypeError
        steps = round(float(number) / step)  # of NaN a ValueError, of infinity an OverflowError
    except (TypeError, ValueError):
        raise RowError(f"the score must be a number, found {value!r:.60}") from None
    except OverflowError:
        raise RowError(f"the score must be finite, found {value!r:.60}") from None
    digits = len(f"{step:.6f}".rstrip("0").split(".")[1])
    return f"{steps * step:.{digits}f}"
