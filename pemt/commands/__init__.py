"""The commands. Each takes its command line, and imports what is heavy when it is called."""

from __future__ import annotations

from collections.abc import Callable

from pemt.commands.bank import bank
from pemt.commands.ops import bench, ops
from pemt.commands.stages import adapt, demo, source
from pemt.commands.tasks import tasks

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "source": source,
    "adapt": adapt,
    "bank": bank,
    "tasks": tasks,
    "demo": demo,
    "ops": ops,
    "bench": bench,
}
