"""The processes of both sides, seen from the one that measures; and what is refused before any of them starts."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/evidence.md"
NEEDED = "4.30"  # of transformers
PROBE = "import safetensors, torch, transformers; print(transformers.__version__)"
TIMEOUT = 300.0  # seconds for one request
LINES = 15  # of a failed process's output that are shown


class BesideError(Exception):
    """What cannot be measured; one line."""


def check_published(checkout: Path, python: str) -> None:
    """Raise `BesideError` where there is no checkout of the published code, or no Python that could run it."""
    if not (checkout / "pemt" / "run_seq2seq.py").is_file():
        raise BesideError(
            f"CHECKOUT: {checkout} has no pemt/run_seq2seq.py; give a checkout of the published code ({PAGE})"
        )
    try:
        done = subprocess.run(
            [python, "-c", PROBE], capture_output=True, text=True, timeout=TIMEOUT
        )
    except OSError as error:
        raise BesideError(f"--python: {python} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        last = (done.stderr.splitlines() or ["no message"])[-1]
        raise BesideError(
            f"--python: {python} lacks what the published code needs ({PAGE}): {last}"
        )
    if not done.stdout.startswith(NEEDED + "."):
        raise BesideError(
            f"--python: {python} has transformers {done.stdout.strip()}, the published code is run with {NEEDED} "
            f"({PAGE})"
        )


def environment(world: Path, threads: int) -> dict[str, str]:
    """Of both sides alike: no network, as many threads as asked for, output as it comes, caches that go with the
    folder of the measurement."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": str(world / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
    }


class Worker:
    """One side's process, for a `with` block.

    Args:
        name: `ours` or `theirs`.
        world: the folder of the measurement; what the process prints goes to a file in it.
        checkout, python: of the published code; None for our side.
    """

    def __init__(
        self,
        name: str,
        world: Path,
        *,
        threads: int,
        checkout: Path | None = None,
        python: str | None = None,
    ) -> None:
        self.name, self.log, self._has_failed = name, world / f"{name}.log", False
        program = Path(__file__).with_name("worker.py")
        more = [] if checkout is None else [str(checkout.resolve())]
        command = [python or sys.executable, str(program), name, str(world.resolve()), *more]
        with self.log.open("w") as printed:
            self._process = subprocess.Popen(
                command,
                env=environment(world, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        if self._has_failed:  # the folder goes, and the log with it
            print(*self.log.read_text().splitlines()[-LINES:], sep="\n", file=sys.stderr)

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """One request, answered.

        Raises:
            BesideError: the request failed there, the process is gone, or it is silent for `TIMEOUT` seconds.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failed(do, "its process has ended") from None
        if not select.select([stdout], [], [], TIMEOUT)[0]:
            raise self._failed(do, f"no answer within {TIMEOUT:g} s")
        line = stdout.readline()
        if not line:
            raise self._failed(do, "its process has ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(do, answer["error"])
        return answer

    def _failed(self, do: str, why: str) -> BesideError:
        self._has_failed = True
        hint = (
            f"; {PAGE} tells which lines of the published code need a change"
            if self.name == "theirs"
            else ""
        )
        return BesideError(f"{self.name}: {do}: {why}{hint}")
