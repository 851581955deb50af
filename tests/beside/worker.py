"""The process of one side: a JSON request a line on stdin, a JSON answer a line on what was stdout.

    PYTHON tests/beside/worker.py ours WORLD
    PYTHON tests/beside/worker.py theirs WORLD CHECKOUT

Started by its path, so that its Python needs no package of this project; what libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback


def main(name: str, *arguments: str) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            side = side or make_side(name, *arguments)
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001  told to who asked
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def make_side(name: str, *arguments: str) -> object:
    """The side by its name; each imports what only its own Python has."""
    if name == "theirs":
        from theirs import Theirs

        return Theirs(*arguments)
    from ours import Ours

    return Ours(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
