"""The folder of a run: whether it may be used, and its configuration."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import yaml

from pemt.checkpoint.names import UNUSABLE, checkpoint_folders, is_checkpoint_name
from pemt.config import (
    NON_IDENTITY_FIELDS,
    TRACKER_RUNS,
    PemtError,
    RunConfig,
    field_keys,
    flatten,
    load_yaml,
)
from pemt.monitor import LOG_FILE, TENSORBOARD_FOLDER
from pemt.storage import remove_partial_writes, write_text

CONFIG, RESULTS, PREDICTIONS = "config.yaml", "all_results.json", "predictions.jsonl"
GIVEN_TASK = "given_task.yaml"  # of a run whose task a Python caller has given


class RunFolderError(PemtError):
    """An output folder that already holds a run, or is no folder."""


def check_run_folder(config: RunConfig) -> None:
    """Refuse to overwrite a run, and to resume another one than the folder holds; nothing is touched here.

    Raises:
        RunFolderError: `output_dir` holds a run of another configuration, or this one and resuming was
            refused by `resume_from_checkpoint: false`; and overwriting was not asked for.
    """
    folder, chosen = Path(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir: {folder} is a file; give a folder")
    if isinstance(chosen, str):
        if not Path(chosen).is_dir():
            raise RunFolderError(
                f"resume_from_checkpoint: no folder {chosen}; give a checkpoint-<step> folder, or `true` for the "
                "newest one in output_dir"
            )
        if Path(chosen).resolve().parent != folder.resolve() and holds_run(folder):
            raise RunFolderError(
                f"output_dir: {folder} already holds a run, and {chosen} is a checkpoint of another; give a new "
                "output_dir"
            )
    if not holds_run(folder) or config.overwrite_output_dir or chosen:
        return
    differences = _differences(config, folder)
    if differences or chosen is False:
        raise RunFolderError(
            f"output_dir: {folder} already holds a run{differences}; give --resume_from_checkpoint true to resume "
            "it all the same, --overwrite_output_dir true to delete it, or another folder"
        )


def _differences(config: RunConfig, folder: Path) -> str:
    """In which fields the run in this folder is another one, for the error; empty if in none."""
    if not (folder / CONFIG).exists():
        return ""  # the checkpoints tell themselves whose they are
    theirs = saved_config(folder)
    if theirs is None:
        return f", whose {CONFIG} cannot be read"
    keys = field_keys(type(config))  # so that a mapping of the user's own is compared whole
    ours = flatten(plain_values(config), keys)
    # A field that was not there when the run began had the default.
    theirs = {**flatten(_defaults(config), keys), **flatten(theirs, keys)}
    if None in (ours["bf16"], theirs["bf16"]):  # left to the device, which is asked later
        ours["bf16"] = theirs["bf16"]
    found = [
        f"{name} {theirs.get(name)}, not {value}"
        for name, value in ours.items()
        if name not in NON_IDENTITY_FIELDS and theirs.get(name) != value
    ]
    return f" with {'; '.join(found)}" if found else ""


def _defaults(config: RunConfig) -> dict[str, Any]:
    """The fields that nobody needs to set, as `plain_values` gives them."""
    values: dict[str, Any] = {}
    for each in fields(config):
        if each.default_factory is not MISSING:
            values[each.name] = each.default_factory()
        elif each.default is not MISSING:
            values[each.name] = each.default
    return json.loads(json.dumps(values, default=asdict))


def saved_config(folder: Path) -> dict[str, Any] | None:
    """What a run's config.yaml holds, unchecked; None where it cannot be read."""
    try:
        values = load_yaml((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) else None


def finished_results(config: RunConfig) -> dict[str, Any] | None:
    """What the run that this very configuration describes has left; None if it is not finished.

    Raises:
        RunFolderError: as `check_run_folder`.
    """
    check_run_folder(config)
    path = Path(config.output_dir) / RESULTS
    if config.resume_from_checkpoint or config.overwrite_output_dir or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the checkpoint is still there, and the test is made again


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / CONFIG).exists() or bool(checkpoint_folders(folder))


def was_written_since(folder: Path, seconds: float) -> bool:
    """Whether the run in this folder has begun, logged or saved since then (seconds since 1970)."""
    for path in (folder / CONFIG, folder / LOG_FILE, *checkpoint_folders(folder)):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= seconds:
                return True
    return False


def start_run_folder(config: RunConfig, *, fresh: bool, task: str | None = None) -> None:
    """Make the folder and write the configuration into it (rank 0 calls, when the folder is locked).

    Args:
        fresh: the run begins at its first step.
        task: YAML of a task that a Python caller has given.

    Raises:
        RunFolderError: it cannot be written, or another run has begun in it since it was looked at.
    """
    folder = Path(config.output_dir)
    if fresh and not config.overwrite_output_dir and holds_run(folder):
        raise RunFolderError(
            f"output_dir: another run has begun in {folder} meanwhile; give another folder, or run the same "
            "command again to resume that run"
        )
    remove_partial_writes(folder, is_checkpoint_name)
    try:
        if config.overwrite_output_dir:
            _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)
        write_text(folder / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False))
        if task is not None:
            write_text(folder / GIVEN_TASK, task)
    except OSError as error:
        raise RunFolderError(f"output_dir: {folder} cannot be written: {error.strerror}") from None


def tracker_runs(folder: Path) -> dict[str, str | None]:
    """The run of each tracker that has been opened for the run in this folder; none where the file cannot be read."""
    try:
        runs = json.loads((folder / TRACKER_RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = runs if isinstance(runs, dict) else {}
    return {name: run if isinstance(run, str) else None for name, run in found.items()}


def write_tracker_runs(folder: Path, runs: Mapping[str, str | None]) -> None:
    """Keep them for whoever resumes.

    Raises:
        RunFolderError: the disk refuses.
    """
    try:
        write_text(folder / TRACKER_RUNS, json.dumps({**tracker_runs(folder), **runs}) + "\n")
    except OSError as error:
        raise RunFolderError(
            f"output_dir: {folder / TRACKER_RUNS} cannot be written: {error.strerror}"
        ) from None


def plain_values(config: RunConfig) -> dict[str, Any]:
    """A configuration as JSON and YAML give it back."""
    return json.loads(json.dumps(asdict(config)))


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, and nothing else that may lie in its folder."""
    for path in (
        *(folder / name for name in (CONFIG, LOG_FILE, PREDICTIONS, GIVEN_TASK, TRACKER_RUNS)),
        *folder.glob("*_results.json"),
        *folder.glob("not-finite-*.jsonl"),
    ):
        path.unlink(missing_ok=True)
    unusable = folder.glob(f"{UNUSABLE}checkpoint-*")
    for path in (folder / TENSORBOARD_FOLDER, *checkpoint_folders(folder), *unusable):
        if path.exists():
            shutil.rmtree(path)
