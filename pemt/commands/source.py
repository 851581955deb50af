"""`pemt source`: stage 1."""

from __future__ import annotations

from pemt.command_line import Parser
from pemt.config import SourceConfig
from pemt.signals import StopSignals


def run(arguments: list[str]) -> None:
    """`pemt source`."""
    with StopSignals():  # from here on, since reading libraries and data takes minutes
        from pemt.arguments import parse_config

        config = parse_config(SourceConfig, arguments, prog="pemt source")
        from pemt.train import run_source

        run_source(config)


def make_parser() -> Parser:
    """What a shell can complete behind it; `run` reads its fields by jsonargparse."""
    from pemt.commands.fields import fields_parser

    return fields_parser("source", SourceConfig, "Train a source task's expert.")
