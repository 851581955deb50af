"""The task table: tasks as the published code trains and scores them, where that differs from the rows above.

`paper-mrpc` is `mrpc` with the targets, metrics and splits of github.com/JachinLin2022/PEMT at c5197de
(pemt/data/tasks.py): there most targets are the classes' names, and the mean that is reported and that chooses the
best checkpoint has accuracy alone. The recipes `paper_full` and `paper_few_shot` train on these.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pemt.tasks.classification import CLASSIFICATION_TASKS
from pemt.tasks.glue import GLUE, GLUE_TASKS
from pemt.tasks.superglue import SUPERGLUE_TASKS
from pemt.tasks.task import HubSource, Row, Task, text_of
from pemt.tasks.values import RowError, plain

PREFIX = "paper-"
FALSE_TRUE = ("False", "True")  # what the hub's copy of SuperGLUE calls 0 and 1


def answer_winogrande(row: Row) -> Row:
    """The option itself is the target, not its number."""
    number = str(plain(row.get("answer")))
    if number not in ("1", "2"):
        raise RowError(f"field 'answer': unknown label {number!r:.60}; allowed: 1, 2")
    return {**row, "answer": text_of(row, f"option{number}")}


# Of each task what differs; without `labels` a classification is answered with its classes' names.
DIFFERENT: dict[str, dict[str, Any]] = {
    "mnli": {
        "hub": HubSource(
            path=GLUE, config="mnli", validation="validation_mismatched", test="validation_matched"
        )
    },
    "qnli": {},
    "qqp": {"metrics": ("accuracy",)},
    "sst2": {},
    "cola": {},
    "mrpc": {"metrics": ("accuracy",)},
    "rte": {},
    # Rounded to one decimal; the paper of T5 rounds to the next 0.2.
    "stsb": {"score_step": 0.1},
    "superglue-boolq": {"labels": FALSE_TRUE},
    "superglue-cb": {"metrics": ("accuracy",)},
    "superglue-multirc": {"labels": FALSE_TRUE},
    "superglue-wic": {"labels": FALSE_TRUE},
    "superglue-wsc-fixed": {"labels": FALSE_TRUE},
    "superglue-record": {
        "template": "record query: {query} entities: {entities} passage: {passage}"
    },
    "scitail": {},
    "winogrande": {"labels": (), "prepare_label": answer_winogrande, "max_target_length": 16},
}


def _as_published(task: Task) -> Task:
    changes = dict(DIFFERENT[task.name])
    if task.labels:
        changes = {"labels": task.label_names, "label_names": ()} | changes
    return replace(task, name=f"{PREFIX}{task.name}", **changes)


PAPER_TASKS = tuple(
    _as_published(task)
    for task in (*GLUE_TASKS, *SUPERGLUE_TASKS, *CLASSIFICATION_TASKS)
    if task.name in DIFFERENT
)
