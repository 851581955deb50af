"""`pemt tasks`."""

from __future__ import annotations

from pemt.commands.parsers import Parser, command_parser


def tasks(arguments: list[str]) -> None:
    """`pemt tasks`: the task table."""
    tasks_parser().parse_args(arguments)
    from pemt.tasks import get_task, task_names

    for name in task_names():
        task = get_task(name)
        print(f"{name:<22} {', '.join(task.metrics):<18} {task.description}")


def tasks_parser() -> Parser:
    """The command line of `pemt tasks`."""
    return command_parser("tasks", "List the tasks.", "pemt tasks | grep nli")
