"""Runs a sweep on the launcher at hand, one run after another, and resumes where it stopped."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from pemt.bank import BankError, entry_names
from pemt.config import PemtError, SourceConfig
from pemt.engine import Job
from pemt.monitor import progress_logger
from pemt.run import run_adapt, run_source
from pemt.storage import write_text
from pemt.sweep.plan import Run, Sweep, SweepError
from pemt.sweep.report import write_report

ERROR = "error.txt"
# Rank 0 alone looks: a network disk may show the others older folders, and ranks in different runs would wait for each
# other.
LOOKING = "looking for what is done"


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
    job = Job(sweep.runs[0].config)
    _train_sources(sweep, job)
    waiting = job.on_rank0(partial(_unfinished, sweep), LOOKING)
    done = len(sweep.runs) - len(waiting)
    _log(job, f"{sweep.output_dir}: {len(sweep.runs)} runs, {done} of them finished before")
    failed: list[Run] = []
    for number, run in enumerate(waiting, start=1):
        _log(job, f"run {number} of {len(waiting)}: {run}")
        config = replace(run.config, resume_from_checkpoint=True)
        error = _error_of(partial(run_adapt, config), run.folder, job)
        if job.is_main:
            write_report(sweep)
        if error is not None:
            if job.world_size > 1:
                raise error
            progress_logger().error(f"{run}: {_line(error)}")
            failed.append(run)
        del error  # which holds on to what the run had in memory
        gc.collect()
    if job.is_main:
        print(write_report(sweep), flush=True)
    if failed:
        raise SweepError(
            f"{sweep.output_dir}: {len(failed)} of {len(sweep.runs)} runs failed ({failed[0]}: see "
            f"{failed[0].folder / ERROR}); the same command retries them"
        )


def _unfinished(sweep: Sweep) -> list[Run]:
    """The runs to train, those that have failed last."""
    unfinished = [run for run in sweep.runs if not run.finished]
    return sorted(unfinished, key=lambda run: (run.folder / ERROR).is_file())


def _train_sources(sweep: Sweep, job: Job) -> None:
    """Stage 1 of every source that the bank lacks (all ranks call)."""
    missing = job.on_rank0(partial(_missing_sources, sweep), LOOKING)
    if kept := [source.task_name for source in sweep.sources if source not in missing]:
        _log(job, f"in the bank {sweep.sources[0].bank_dir}, kept: {', '.join(kept)}")
    for number, source in enumerate(missing, start=1):
        _log(job, f"source {number} of {len(missing)}: {source.task_name}")
        config = replace(source, resume_from_checkpoint=True)
        if error := _error_of(partial(run_source, config), Path(source.output_dir), job):
            raise error


def _missing_sources(sweep: Sweep) -> list[SourceConfig]:
    try:
        there = entry_names(sweep.sources[0].bank_dir) if sweep.sources else []
    except BankError:  # no bank yet
        there = []
    return [source for source in sweep.sources if source.task_name not in there]


def _log(job: Job, line: str) -> None:
    if job.is_main:
        progress_logger().info(line)


def _error_of(train: Callable[[], object], folder: Path, job: Job) -> Exception | None:
    """What has ended a run, which `error.txt` in its folder tells too; where nothing has, an older one goes."""
    try:
        train()
    except Exception as error:  # noqa: BLE001  whatever it is, the next run may do better
        if job.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            told = [f"{_line(error)}\n"]
            if not isinstance(error, PemtError):
                told += traceback.format_exception(error)
            write_text(folder / ERROR, "".join(told))
        return error
    if job.is_main:
        (folder / ERROR).unlink(missing_ok=True)
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
