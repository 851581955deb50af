"""`pemt source`: stage 1."""

from __future__ import annotations

from pemt.commands.fields import fields_parser, run_stage
from pemt.config import Parser, SourceConfig


def run(arguments: list[str]) -> None:
    """`pemt source`."""
    run_stage(SourceConfig, "source", arguments)


def make_parser() -> Parser:
    """What a shell can complete behind it; `run` reads its fields by jsonargparse."""
    return fields_parser("source", SourceConfig, "Train a source task's expert.")
