"""Every known task by name."""

from __future__ import annotations

import difflib

from pemt.tasks.answers import ANSWER_TASKS
from pemt.tasks.choices import CHOICE_TASKS
from pemt.tasks.glue import GLUE_TASKS
from pemt.tasks.superglue import SUPERGLUE_TASKS
from pemt.tasks.task import Task, TaskError
from pemt.tasks.task_file import load_task_file

_TASKS: dict[str, Task] = {
    task.name: task for task in (*ANSWER_TASKS, *GLUE_TASKS, *SUPERGLUE_TASKS, *CHOICE_TASKS)
}


def task_names() -> tuple[str, ...]:
    """The names of all registered tasks, in the table's order."""
    return tuple(_TASKS)


def get_task(name: str, task_file: str | None = None) -> Task:
    """The task of that name, from the table or from a YAML file.

    Raises TaskError, with the nearest names where the table has none like it.
    """
    if task_file is not None:
        task = load_task_file(task_file)
        if task.name != name:
            raise TaskError(
                f"task_name: found {name!r}, but {task_file} describes {task.name!r}; "
                "give the same name in both"
            )
        return task
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
