"""`pemt adapt`: stage 2."""

from __future__ import annotations

from pemt.commands.fields import fields_parser, run_stage
from pemt.config import AdaptConfig, Parser


def run(arguments: list[str]) -> None:
    """`pemt adapt`."""
    run_stage(AdaptConfig, "adapt", arguments)


def make_parser() -> Parser:
    """What a shell can complete behind it; `run` reads its fields by jsonargparse."""
    return fields_parser("adapt", AdaptConfig, "Adapt to a target task.")
