"""The commands. Each takes its command line, and imports what is heavy when it is called.

A new command needs a line here and one in `overview.py`; with a parser of its own, one in PARSERS.
"""

from __future__ import annotations

from collections.abc import Callable

from pemt.commands.bank import bank, bank_parser
from pemt.commands.completion import completion_parser, completion_script, fields_parser
from pemt.commands.doctor import doctor, doctor_parser
from pemt.commands.finished import evaluate, evaluate_parser, predict, predict_parser
from pemt.commands.ops import bench, ops, ops_parser
from pemt.commands.overview import AROUND
from pemt.commands.parsers import Parser, command_parser
from pemt.commands.plan import plan, plan_parser
from pemt.commands.publish import (
    export,
    export_parser,
    pull,
    pull_parser,
    push,
    push_parser,
)
from pemt.commands.report import report, report_parser
from pemt.commands.stages import adapt, demo, source
from pemt.commands.sweep import sweep, sweep_parser
from pemt.commands.tasks import tasks, tasks_parser
from pemt.config import AdaptConfig, SourceConfig


def completion(arguments: list[str]) -> None:
    """`pemt completion`."""
    shell = completion_parser().parse_args(arguments).shell
    commands = {
        name: PARSERS[name]() if name in PARSERS else command_parser(name, AROUND.get(name, name))
        for name in COMMANDS
    }
    print(completion_script(shell, commands))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "source": source,
    "adapt": adapt,
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "sweep": sweep,
    "bank": bank,
    "export": export,
    "push": push,
    "pull": pull,
    "tasks": tasks,
    "demo": demo,
    "plan": plan,
    "doctor": doctor,
    "ops": ops,
    "bench": bench,
    "completion": completion,
}
# what a shell can complete behind a command
PARSERS: dict[str, Callable[[], Parser]] = {
    "source": lambda: fields_parser("source", SourceConfig, "Train a source task's expert."),
    "adapt": lambda: fields_parser("adapt", AdaptConfig, "Adapt to a target task."),
    "evaluate": evaluate_parser,
    "predict": predict_parser,
    "report": report_parser,
    "sweep": sweep_parser,
    "bank": bank_parser,
    "export": export_parser,
    "push": push_parser,
    "pull": pull_parser,
    "tasks": tasks_parser,
    "plan": plan_parser,
    "doctor": doctor_parser,
    "ops": ops_parser,
    "completion": completion_parser,
}
