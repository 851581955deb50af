"""`pemt tasks`."""

from __future__ import annotations

from pemt.command_line import Parser, command_parser


def run(arguments: list[str]) -> None:
    """`pemt tasks`: the task table."""
    make_parser().parse_args(arguments)
    from pemt.tasks import get_task, task_names

    for name in task_names():
        task = get_task(name)
        print(f"{name:<22} {', '.join(task.metrics):<18} {task.description}")


def make_parser() -> Parser:
    """The command line of `pemt tasks`."""
    return command_parser("tasks", "List the tasks.", "pemt tasks | grep nli")
