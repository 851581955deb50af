"""`pemt source`: stage 1."""

from __future__ import annotations

from pemt.config import Parser, SourceConfig
from pemt.engine import LIBRARIES, StopSignals, telling


def run(arguments: list[str]) -> None:
    """`pemt source`."""
    with StopSignals():  # from here on, since reading libraries and data takes minutes
        from pemt.config import parse_config

        config = parse_config(SourceConfig, arguments, prog="pemt source")
        from pemt.run import check_early

        check_early(config)
        with telling(LIBRARIES):
            from pemt.run import run_source

        run_source(config)


def make_parser() -> Parser:
    """What a shell can complete behind it; `run` reads its fields by jsonargparse."""
    from pemt.commands.fields import fields_parser

    return fields_parser("source", SourceConfig, "Train a source task's expert.")
