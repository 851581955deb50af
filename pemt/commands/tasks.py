"""`pemt tasks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pemt.config import Parser, command_parser

if TYPE_CHECKING:
    from pemt.tasks import Task


def run(arguments: list[str]) -> None:
    """`pemt tasks`: the task table, or one task in full."""
    options = make_parser().parse_args(arguments)
    from pemt.tasks import get_task, load_task_file, task_names

    if options.name:
        print(shown(get_task(options.name, options.task_file)))
    elif options.task_file:
        print(shown(load_task_file(options.task_file)))
    else:
        for name in task_names():
            task = get_task(name)
            print(f"{name:<22} {', '.join(task.metrics):<18} {task.description}")


def shown(task: Task) -> str:
    """All that a user of a task asks: what it reads, what it answers, how it is scored."""
    rows = {
        "task": task.name,
        "description": task.description,
        "template": task.template,
        "answers": answers(task),
        "metrics": ", ".join(task.metrics),
        "longest answer": f"{task.max_target_length} tokens"
        if task.max_target_length
        else "as its data need (max_target_length)",
        "hub": " ".join(filter(None, (task.hub.path, task.hub.config))) if task.hub else "none",
    }
    return "\n".join(f"{name:<15} {text}" for name, text in rows.items())


def answers(task: Task) -> str:
    """The target texts, with what each is called; or what else is answered."""
    from pemt.tasks import label_with_name

    if task.score_step is not None:
        return f"numbers, in steps of {task.score_step:g}"
    if not task.labels:
        return "text"
    return ", ".join(label_with_name(task, label) for label in task.labels)


def make_parser() -> Parser:
    """The command line of `pemt tasks`."""
    parser = command_parser(
        "tasks",
        "List the tasks, or show one: what it reads, what it answers, how it is scored.",
        "pemt tasks | grep nli",
        "pemt tasks superglue-cb",
    )
    parser.add_argument("name", nargs="?", help="a task; default: list them all")
    parser.add_argument("--task_file", metavar="FILE", help="show a task of your own")
    return parser
