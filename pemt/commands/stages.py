"""The two stages, and both on a small world."""

from __future__ import annotations

from pemt.arguments import parse_config
from pemt.config import AdaptConfig, SourceConfig


def source(arguments: list[str]) -> None:
    """Stage 1."""
    config = parse_config(SourceConfig, arguments, prog="pemt source")
    from pemt.train import run_source

    run_source(config)


def adapt(arguments: list[str]) -> None:
    """Stage 2."""
    config = parse_config(AdaptConfig, arguments, prog="pemt adapt")
    from pemt.train import run_adapt

    run_adapt(config)


def demo(arguments: list[str]) -> None:
    """`pemt demo`."""
    from pemt.demo.run import main

    main(arguments)
