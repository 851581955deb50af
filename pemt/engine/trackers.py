"""Experiment trackers besides TensorBoard and log.jsonl: those that accelerate knows, opened by rank 0 alone."""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

# isort: split

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, MLflowTracker

from pemt.config import TENSORBOARD, TRACKER_RUNS, ConfigError, RunConfig

PROJECT = "pemt"  # of wandb, the experiment of mlflow, ...


class Tracker(Protocol):
    """What accelerate's trackers have in common (`accelerate.tracking.GeneralTracker`)."""

    name: str
    tracker: Any  # the tracker's own run

    def start(self) -> None:
        """Open the run."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep a run's configuration, a plain value each."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Record values by tag."""

    def finish(self) -> None:
        """Send what is held back, and end the run."""


@dataclass(frozen=True)
class _Runs:
    """How a tracker tells which run it has opened, and what it takes to open that one again."""

    id_of: Callable[[Any], str]
    again: Callable[[str], dict[str, Any]]


# trackio is not among them: it resumes the newest run of a name, and every sweep has its `seed-0`s.
_RUNS = {
    "wandb": _Runs(lambda run: run.id, lambda known: {"id": known, "resume": "allow"}),
    "mlflow": _Runs(lambda run: run.info.run_id, lambda known: {"run_id": known}),
}


def open_trackers(
    config: RunConfig, runs: Mapping[str, str | None]
) -> tuple[list[Tracker], dict[str, str | None]]:
    """The trackers that `report_to` names, TensorBoard aside, each with a run of the name of output_dir.

    Args:
        config: the run's.
        runs: what this has returned when the run was begun, so that it goes on in the same runs; empty at first.

    Returns:
        The trackers; and the run of each by the tracker's name, None where it cannot be opened again.

    Raises:
        ConfigError: one does not open, with what it says.
    """
    opened: dict[str, Tracker] = {}
    for name in dict.fromkeys(config.report_to):
        if name == TENSORBOARD:
            continue
        try:
            opened[name] = _open(name, Path(config.output_dir).resolve(), runs.get(name))
        except Exception as error:  # each has its own
            for tracker in opened.values():
                tracker.finish()
            what = " ".join(str(error).split()) or type(error).__name__
            instead = f", or begin another run there: delete {TRACKER_RUNS} in {config.output_dir}"
            raise ConfigError(
                f"report_to: {name} does not open: {what}; leave it out, or see to its account and settings"
                f"{instead if runs.get(name) else ''}"
            ) from error
        if name in runs and name not in _RUNS:
            print(
                f"pemt: report_to: {name}: what follows is another run there; a resumed run goes on in the same one in "
                f"{', '.join(_RUNS)} alone",
                file=sys.stderr,
                flush=True,
            )
    return [*opened.values()], {name: _run_of(name, each) for name, each in opened.items()}


def _open(name: str, folder: Path, run: str | None) -> Tracker:
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "mlflow" and run is not None:
        kind = _ResumedMLflow
    place = (str(folder),) if kind.requires_logging_directory else ()
    again = {} if run is None or name not in _RUNS else _RUNS[name].again(run)
    tracker: Tracker = kind(_project(name), *place, **{**_settings(name, folder), **again})
    tracker.start()
    return tracker


def _run_of(name: str, tracker: Tracker) -> str | None:
    return _RUNS[name].id_of(tracker.tracker) if name in _RUNS else None


class _ResumedMLflow(MLflowTracker):
    """mlflow keeps a run's parameters for good, and refuses another value: of ranks, or resume_from_checkpoint."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record what is new."""
        known = self.tracker.data.params
        super().store_init_configuration({k: v for k, v in values.items() if k not in known})


def _project(name: str) -> str:
    return os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT


def _settings(name: str, folder: Path) -> dict[str, Any]:
    """What a tracker's own call takes for a run's name, and for the folder that it writes into."""
    known: dict[str, dict[str, Any]] = {
        "wandb": {"name": folder.name, "dir": str(folder)},
        "mlflow": {"run_name": folder.name},
        "trackio": {"name": folder.name},
    }
    return known.get(name, {})
