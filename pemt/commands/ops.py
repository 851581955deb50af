"""`pemt ops` and `pemt bench`: the fused op, built and timed."""

from __future__ import annotations

import argparse

from pemt.config import PemtError


def ops(arguments: list[str]) -> None:
    """`pemt ops build` and `pemt ops info`."""
    parser = argparse.ArgumentParser(prog="pemt ops", description="The fused op.")
    parser.add_argument(
        "verb", choices=["build", "info"], help="compile it now; tell what would run and why"
    )
    verb = parser.parse_args(arguments).verb
    from pemt.ops import OpsError, build

    try:
        print("\n".join(build.build_all() if verb == "build" else build.describe()))
    except OpsError as error:
        raise PemtError(str(error)) from None


def bench(arguments: list[str]) -> None:
    """`pemt bench op`."""
    if arguments[:1] != ["op"]:
        raise PemtError(
            f"pemt bench: found {' '.join(arguments[:1]) or 'nothing'}, allowed is `op`"
        )
    from pemt.bench.op import main

    main(arguments[1:])
