"""`pemt adapt`: stage 2."""

from __future__ import annotations

from pemt.commands.fields import run_stage, stage_parser
from pemt.config import Parser


def run(arguments: list[str]) -> None:
    """`pemt adapt`."""
    run_stage("adapt", arguments)


def make_parser() -> Parser:
    """What a shell can complete behind it, less the fields; `run` reads both by jsonargparse."""
    return stage_parser("adapt", "Adapt to a target task.")
