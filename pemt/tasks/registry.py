"""Every known task by name: the table, and what Python users register."""

from __future__ import annotations

import difflib

from pemt.tasks.answers import ANSWER_TASKS
from pemt.tasks.classification import CLASSIFICATION_TASKS
from pemt.tasks.glue import GLUE_TASKS
from pemt.tasks.paper import PAPER_TASKS
from pemt.tasks.superglue import SUPERGLUE_TASKS
from pemt.tasks.task import Task, TaskError

_TASKS: dict[str, Task] = {
    task.name: task
    for task in (*ANSWER_TASKS, *GLUE_TASKS, *SUPERGLUE_TASKS, *CLASSIFICATION_TASKS, *PAPER_TASKS)
}


def task_names() -> tuple[str, ...]:
    """The names of all registered tasks, in the table's order."""
    return tuple(_TASKS)


def known_task(name: str) -> Task:
    """The registered task of that name.

    Raises TaskError, with the nearest names where there is none like it.
    """
    if name in _TASKS:
        return _TASKS[name]
    near = difflib.get_close_matches(name, _TASKS, n=3, cutoff=0.4)
    near += [known for known in _TASKS if name in known and known not in near]
    hint = ", ".join(near) if near else ", ".join(_TASKS)
    raise TaskError(
        f"task_name: found {name!r}, which is no known task; nearest: {hint}; "
        "give one of these, or describe your own with --task_file"
    )


def register_task(task: Task) -> Task:
    """Makes a task known by its name; TaskError where another task has that name."""
    if _TASKS.setdefault(task.name, task) != task:
        raise TaskError(f"task {task.name}: another task has that name already; choose another")
    return task
