"""Runs a sweep on the launcher at hand, one run after another, and resumes where it stopped."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pemt.bank import BankError, entry_names
from pemt.config import PemtError
from pemt.engine import Job
from pemt.monitor import progress_logger
from pemt.run import run_adapt, run_source
from pemt.storage import write_text
from pemt.sweep.plan import Run, Sweep, SweepError
from pemt.sweep.report import write_report

ERROR = "error.txt"


def run_sweep(sweep: Sweep) -> None:
    """Train what is not finished yet, and write the report after each run (all ranks call).

    Stage 1 of the sources that the bank lacks comes first; without one of them the sweep stops.
    A run that was interrupted resumes from its newest checkpoint. One that fails, by whatever error, is
    recorded in its folder as `error.txt`, and tried again after the others. In a single process the
    sweep continues with the next run; on several ranks it stops, since the others may wait in a
    collective call.

    Raises:
        SweepError: runs failed.
        Exception: what ended a run on several ranks.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    _train_sources(sweep, is_main=is_main, alone=alone)
    waiting = _waiting(sweep, alone=alone)
    if is_main:
        done = len(sweep.runs) - len(waiting)
        progress_logger().info(
            f"{sweep.output_dir}: {len(sweep.runs)} runs, {done} of them finished before"
        )
    failed: list[Run] = []
    for number, run in enumerate(waiting, start=1):
        if is_main:
            progress_logger().info(f"run {number} of {len(waiting)}: {run}")
        try:
            run_adapt(replace(run.config, resume_from_checkpoint=True))
        except Exception as error:
            if is_main:
                _record(run.folder, error)
                write_report(sweep)
            if not alone:
                raise
            progress_logger().error(f"{run}: {_line(error)}")
            failed.append(run)
        else:
            if is_main:
                (run.folder / ERROR).unlink(missing_ok=True)
                write_report(sweep)
        gc.collect()  # a run that failed has not released its model, and the next one needs the memory
    if is_main:
        print(write_report(sweep), flush=True)
    if failed:
        raise SweepError(
            f"{sweep.output_dir}: {len(failed)} of {len(sweep.runs)} runs failed ({failed[0]}: see "
            f"{failed[0].folder / ERROR}); the same command retries them"
        )


def _waiting(sweep: Sweep, *, alone: bool) -> list[Run]:
    """The runs that rank 0 finds unfinished, failed ones last (all ranks call).

    A network disk may show the others older folders, and ranks in different runs would wait for each other.
    """

    def look() -> list[int]:
        numbers = [number for number, run in enumerate(sweep.runs) if not run.finished]
        return sorted(numbers, key=lambda number: (sweep.runs[number].folder / ERROR).is_file())

    return [sweep.runs[number] for number in _on_rank0(sweep, look, alone=alone)]


def _train_sources(sweep: Sweep, *, is_main: bool, alone: bool) -> None:
    """Stage 1 of every source that the bank lacks (all ranks call)."""

    def look() -> list[int]:
        try:
            there = entry_names(sweep.sources[0].bank_dir) if sweep.sources else []
        except BankError:  # no bank yet
            there = []
        return [n for n, source in enumerate(sweep.sources) if source.task_name not in there]

    missing = [sweep.sources[number] for number in _on_rank0(sweep, look, alone=alone)]
    kept = [source.task_name for source in sweep.sources if source not in missing]
    if kept and is_main:
        progress_logger().info(f"in the bank {sweep.sources[0].bank_dir}, kept: {', '.join(kept)}")
    for number, source in enumerate(missing, start=1):
        if is_main:
            progress_logger().info(f"source {number} of {len(missing)}: {source.task_name}")
        folder = Path(source.output_dir)
        try:
            run_source(replace(source, resume_from_checkpoint=True))
        except Exception as error:
            if is_main:
                _record(folder, error)
            raise
        if is_main:
            (folder / ERROR).unlink(missing_ok=True)
        gc.collect()


def _on_rank0(sweep: Sweep, look: Callable[[], list[int]], *, alone: bool) -> list[int]:
    return look() if alone else Job(sweep.runs[0].config).on_rank0(look, "looking for what is done")


def _record(folder: Path, error: Exception) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trace = "" if isinstance(error, PemtError) else "".join(traceback.format_exception(error))
    write_text(folder / ERROR, f"{_line(error)}\n{trace}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
