"""The tasks: what each reads, what the model is asked, what counts as right."""

from pemt.tasks.registry import register_task, task_names
from pemt.tasks.scoring import example_scores, score, told_once
from pemt.tasks.task import (
    SPLITS,
    Example,
    HubSource,
    RowError,
    Task,
    TaskError,
    class_name,
    encodable,
    example_of,
    has_label,
    label_name,
    source_of,
)
from pemt.tasks.task_file import get_task, load_task_file

__all__ = [
    "SPLITS",
    "Example",
    "HubSource",
    "RowError",
    "Task",
    "TaskError",
    "class_name",
    "encodable",
    "example_of",
    "example_scores",
    "get_task",
    "has_label",
    "label_name",
    "load_task_file",
    "register_task",
    "score",
    "source_of",
    "task_names",
    "told_once",
]
