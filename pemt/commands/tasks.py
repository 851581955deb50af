"""`pemt tasks`."""

from __future__ import annotations

import argparse


def tasks(arguments: list[str]) -> None:
    """`pemt tasks`: the task table."""
    argparse.ArgumentParser(prog="pemt tasks", description="List the tasks.").parse_args(arguments)
    from pemt.tasks import get_task, task_names

    for name in task_names():
        task = get_task(name)
        print(f"{name:<22} {', '.join(task.metrics):<18} {task.description}")
