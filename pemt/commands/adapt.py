"""`pemt adapt`: stage 2."""

from __future__ import annotations

from pemt.config import AdaptConfig, Parser
from pemt.engine import LIBRARIES, StopSignals, telling


def run(arguments: list[str]) -> None:
    """`pemt adapt`."""
    with StopSignals():  # from here on, since reading libraries and data takes minutes
        from pemt.config import parse_config

        config = parse_config(AdaptConfig, arguments, prog="pemt adapt")
        from pemt.run import check_early

        check_early(config)
        with telling(LIBRARIES):
            from pemt.run import run_adapt

        run_adapt(config)


def make_parser() -> Parser:
    """What a shell can complete behind it; `run` reads its fields by jsonargparse."""
    from pemt.commands.fields import fields_parser

    return fields_parser("adapt", AdaptConfig, "Adapt to a target task.")
