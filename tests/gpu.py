"""`make gpu`: everything that wants an NVIDIA GPU, what is missed most first, with what is installed here.

    python -m tests.gpu [--output_dir runs/gpu] [--dry_run]

The op's checks want torch (2.11 or later) and a CUDA toolkit alone. The kernels are compiled at first use; to carry
them, `TORCH_EXTENSIONS_DIR=kernels pemt ops build` beside the same PyTorch, and the same variable here.
A step that fails stops no other; a step whose packages are not here is left out, and both are told at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds a step
CHECKS = ("-m", "tests.ops.standalone")
SHAPES = ("t5-large", "flan-t5-xl", "t5-3b")
# a step cannot run for want of them: what is missing here, and no failure
LEFT_OUT = re.compile(r"No module named '?((?!pemt\b|tests\b)[\w.]+)|(Device not supported)")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One program: words after `python`; its output goes to <name>.log, and to <name>.json if it prints that."""

    name: str
    words: tuple[str, ...]
    before: tuple[str, ...] = ()

    @property
    def prints_json(self) -> bool:
        """A bench."""
        return "--json" in self.words


def steps(*, dry_run: bool) -> list[Step]:
    """What is run, in this order; a dry run tries the same on a CPU, with little of each."""
    gpu = ("--device", "cuda", "--dtype", "bfloat16", "--json")
    tiny = ("--device", "cpu", "--rounds", "1", "--json")
    op: tuple[str, ...] = ("-m", "pemt", "bench", "op", *gpu, "--batch", "32", "--shape", *SHAPES)
    model: tuple[str, ...] = (*gpu, "--size", "t5-large")
    graph: tuple[str, ...] = ("--cuda_graph",)
    tokens = ("--tokens", "256")
    checks: tuple[str, ...] = CHECKS
    tests: tuple[str, ...] = ("-m", "pytest", "-m", "gpu", "-rA", "--continue-on-collection-errors")
    if dry_run:
        op = ("-m", "pemt", "bench", "op", *tiny, "--batch", "2", "--shape", "t5-small")
        model = (*tiny, "--size", "t5-small", "--layers", "1")
        graph, tokens = (), ("--tokens", "16")
        checks, tests = (*CHECKS, "--device", "cpu", "--brief"), (*tests, "--collect-only", "-q")
    sanitizer = _sanitizer()
    memcheck: tuple[str, ...] = ()
    if sanitizer is not None and not dry_run:
        memcheck = (sanitizer, "--tool", "memcheck", "--error-exitcode", "9")
    decoding = ("--tokens", "1", "--forward_only")
    return [
        Step(name="op_checks", words=checks),
        *([Step(name="op_memcheck", words=(*CHECKS, "--brief"), before=memcheck)] if memcheck else []),
        Step(name="bench_op", words=(*op, *tokens)),
        Step(name="bench_op_graph", words=(*op, *tokens, *graph)),
        Step(name="bench_decode", words=(*op, *decoding)),
        Step(name="bench_decode_graph", words=(*op, *decoding, *graph)),
        Step(name="bench_step", words=("-m", "pemt", "bench", "step", *model)),
        Step(name="bench_generate", words=("-m", "pemt", "bench", "generate", *model)),
        Step(name="tests", words=tests),
    ]  # fmt: skip


def _sanitizer() -> str | None:
    usual = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [f"{folder}/bin" for folder in usual if folder]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))


def run(step: Step, folder: Path) -> str:
    """How it went: passed, left out or FAILED, and why. What it prints is shown and kept."""
    print(f"\n== {step.name}: {' '.join(('python', *step.words))}", flush=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    began, log = time.monotonic(), folder / f"{step.name}.log"
    kept = folder / f"{step.name}.json"
    with (
        log.open("w") as errors,
        (kept if step.prints_json else Path(os.devnull)).open("w") as output,
    ):
        try:
            done = subprocess.run(
                [*step.before, sys.executable, *step.words],
                cwd=ROOT,
                env=environment,
                timeout=TIMEOUT,
                stdout=output if step.prints_json else errors,
                stderr=errors,
            )
            status: int | None = done.returncode
        except subprocess.TimeoutExpired:
            status = None
    text = log.read_text(errors="replace")
    print(kept.read_text() + text if step.prints_json else text, flush=True)
    seconds = f"{time.monotonic() - began:.0f} s"
    if status == 0:
        return f"passed ({seconds})"
    if status is None:
        return f"FAILED: not done after {TIMEOUT} s"
    missing = None if " passed" in text else LEFT_OUT.search(text)
    if missing is not None:
        return f"left out: {'no ' + missing[1] if missing[1] else missing[2]} here"
    return f"FAILED with exit status {status} ({seconds}), see {log}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry_run", action="store_true", help="little of each, on a CPU")
    options = parser.parse_args()
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.log"), *folder.glob("*.json")):
        old.unlink()
    told = {step.name: run(step, folder) for step in steps(dry_run=options.dry_run)}
    print(f"\nIn {folder}:")
    for name, how in told.items():
        print(f"  {name:20} {how}")
    return int(any(how.startswith("FAILED") for how in told.values()))


if __name__ == "__main__":
    sys.exit(main())
