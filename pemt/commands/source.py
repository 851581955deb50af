"""`pemt source`: stage 1."""

from __future__ import annotations

from pemt.commands.fields import run_stage, stage_parser
from pemt.config import Parser


def run(arguments: list[str]) -> None:
    """`pemt source`."""
    run_stage("source", arguments)


def make_parser() -> Parser:
    """What a shell can complete behind it, less the fields; `run` reads both by jsonargparse."""
    return stage_parser("source", "Train a source task's expert.")
