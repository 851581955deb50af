"""The tasks: what each reads, what the model is asked, what counts as right."""

from pemt.tasks.registry import register_task, task_names
from pemt.tasks.scoring import example_scores, score
from pemt.tasks.task import (
    SPLITS,
    Example,
    HubSource,
    Task,
    TaskError,
    class_name,
    example_of,
    has_label,
    is_class_id,
    label_name,
    longest_target,
    source_of,
)
from pemt.tasks.task_file import get_task, load_task_file
from pemt.tasks.values import ClassId, RowError, encodable, has_numbers

__all__ = [
    "SPLITS",
    "ClassId",
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
    "has_numbers",
    "is_class_id",
    "label_name",
    "load_task_file",
    "longest_target",
    "register_task",
    "score",
    "source_of",
    "task_names",
]
