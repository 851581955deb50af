"""Experiment trackers besides TensorBoard and log.jsonl: those that accelerate knows, opened by rank 0 alone."""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker as Tracker, MLflowTracker

from pemt.config import TENSORBOARD, TRACKER_RUNS, ConfigError, RunConfig

PROJECT = "pemt"  # of wandb, the experiment of mlflow, ...
# trackio is not among them: it resumes the newest run of a name, and every sweep has its `seed-0`s.
_RESUMED = ("wandb", "mlflow")


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
        if name in runs and name not in _RESUMED:
            print(
                f"pemt: report_to: {name}: what follows is another run there; a resumed run goes on in the same one in "
                f"{', '.join(_RESUMED)} alone",
                file=sys.stderr,
                flush=True,
            )
    return [*opened.values()], {name: _run_of(name, each) for name, each in opened.items()}


def _open(name: str, folder: Path, run: str | None) -> Tracker:
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if name == "mlflow" and run is not None:
        kind = _ResumedMLflow
    project = os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT
    place = (str(folder),) if kind.requires_logging_directory else ()
    tracker: Tracker = kind(project, *place, **_settings(name, folder, run))
    tracker.start()
    return tracker


def _settings(name: str, folder: Path, run: str | None) -> dict[str, Any]:
    """What a tracker's own call takes for a run's name, the folder that it writes into, and the run to go on in."""
    if name == "wandb":
        again = {"id": run, "resume": "allow"} if run else {}
        return {"name": folder.name, "dir": str(folder), **again}
    if name == "mlflow":
        return {"run_name": folder.name, **({"run_id": run} if run else {})}
    return {"name": folder.name} if name == "trackio" else {}


def _run_of(name: str, tracker: Any) -> str | None:
    """Which run a tracker has opened; None where it cannot be opened again."""
    if name == "wandb":
        return tracker.tracker.id
    return tracker.tracker.info.run_id if name == "mlflow" else None


class _ResumedMLflow(MLflowTracker):
    """mlflow keeps a run's parameters for good, and refuses another value: of ranks, or resume_from_checkpoint."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record what is new."""
        known = self.tracker.data.params
        super().store_init_configuration({k: v for k, v in values.items() if k not in known})
