"""Experiment trackers besides TensorBoard and log.jsonl: those that accelerate knows, opened by rank 0 alone."""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

# isort: split

import os
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from pemt.config import TENSORBOARD, ConfigError, RunConfig

PROJECT = "pemt"  # of wandb, the experiment of mlflow, ...


class Tracker(Protocol):
    """What accelerate's trackers have in common (`accelerate.tracking.GeneralTracker`)."""

    name: str

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep a run's configuration, a plain value each."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Record values by tag."""

    def finish(self) -> None:
        """Send what is held back, and end the run."""


def open_trackers(config: RunConfig) -> list[Tracker]:
    """The trackers that `report_to` names, TensorBoard aside, each with a run of the name of output_dir.

    Raises:
        ConfigError: one does not open, with what it says.
    """
    opened: list[Tracker] = []
    for name in dict.fromkeys(config.report_to):
        if name == TENSORBOARD:
            continue
        folder = Path(config.output_dir).resolve()
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        place = (str(folder),) if kind.requires_logging_directory else ()
        try:
            tracker = kind(_project(name), *place, **_settings(name, folder))
            tracker.start()
        except Exception as error:  # each has its own
            what = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"report_to: {name} does not open: {what}; leave it out, or see to its account and settings"
            ) from error
        opened.append(tracker)
    return opened


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
