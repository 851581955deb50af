"""`python -m tests.parity FILE.safetensors ...`: exits 1 unless we give the published numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .compare import report
from .golden import GoldenError


def main(paths: Sequence[str]) -> int:
    """0: all agree; 1: some do not; 2: a file cannot be read."""
    if not paths:
        print("usage: python -m tests.parity FILE.safetensors ...", file=sys.stderr)
        return 2
    try:
        results = [report(path) for path in paths]
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
