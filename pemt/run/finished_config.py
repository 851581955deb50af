"""What a finished run's folder tells without its weights: its configuration, and which checkpoint is the best."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.checkpoint import (
    CONFIG,
    GIVEN_TASK,
    checkpoint_folders,
    saved_config,
    train_state_of,
)
from pemt.config import AdaptConfig, PemtError, RunConfig, SourceConfig, parse_config, value_sources
from pemt.run.early import check_base_place
from pemt.storage import read_manifest
from pemt.tasks import Task, get_task, load_task_file


class FinishedError(PemtError):
    """A folder that holds no run to load."""


def check_finished(run_dir: str | Path, overrides: Sequence[str] = ()) -> None:
    """Refuse a run that cannot be loaded, as far as it shows without torch.

    Raises:
        PemtError: as `finished_config`; or there is no such task or base model.
    """
    config = finished_config(run_dir, overrides)
    task_of_run(run_dir, config)
    if os.environ.get("RANK", "0") == "0":
        check_base_place(config)


def finished_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run left in its folder.

    Args:
        run_dir: the run's output folder.
        overrides: `--field value` pairs, as on the command line: another task or data, where base
            model and bank lie now, batch size, beams. Another task does not inherit the run's
            `data_dir` and `task_file`.

    Raises:
        FinishedError: the folder holds no run, or none that has a checkpoint yet.
        ConfigError: `config.yaml` or an override is wrong.
        StorageError: the checkpoint's manifest is damaged.
    """
    run_dir = Path(run_dir).expanduser()
    path = run_dir / CONFIG
    if not path.is_file():
        raise FinishedError(
            f"{run_dir}: holds no run ({CONFIG} is missing); give the output_dir of `pemt adapt` or `pemt source`"
        )
    _, manifest = best_checkpoint(run_dir)
    is_source = manifest["run"]["stage"] == "source"
    kind: type[RunConfig] = SourceConfig if is_source else AdaptConfig
    arguments = ["--config", str(path), *overrides]
    config = parse_config(kind, arguments, prog="pemt evaluate")
    changes: dict[str, Any] = {"resume_from_checkpoint": None, "overwrite_output_dir": False}
    if config.task_name != (saved_config(run_dir) or {}).get("task_name"):
        sources = value_sources(kind, arguments)
        inherited = ("data_dir", "data_fingerprint", "task_file")
        own = [field for field in inherited if sources[field] == str(path)]
        changes |= dict.fromkeys(own)
    return replace(config, **changes)


def task_of_run(run_dir: str | Path, config: RunConfig) -> Task:
    """The task of a finished run, or the one that an override has put in its place.

    Raises:
        TaskError: there is none of that name; or the run's own was given in Python, with functions in it that no file
            can hold, and is not registered here.
    """
    given = Path(run_dir).expanduser() / GIVEN_TASK
    if config.task_file is None and given.is_file():
        task = load_task_file(given)
        if task.name == config.task_name:
            return task
    return get_task(config.task_name, config.task_file)


def best_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The best validated checkpoint (the newest where nothing was validated), and its manifest."""
    folders = checkpoint_folders(folder)
    if not folders:
        raise FinishedError(f"{folder}: holds a run without a checkpoint; train it first")
    newest = train_state_of(read_manifest(folders[-1]))
    best = folder / f"checkpoint-{newest.best_step}"
    chosen = best if newest.best_step is not None and best.is_dir() else folders[-1]
    manifest = read_manifest(chosen)
    run = manifest.get("run")
    if not isinstance(run, dict) or run.get("stage") not in ("source", "adapt"):
        raise FinishedError(f"{chosen}: tells no stage; it was written by another version")
    return chosen, manifest
