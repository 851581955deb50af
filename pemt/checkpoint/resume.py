"""How a run begins: fresh, from a checkpoint, or not at all since it is finished; and with which configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from pemt.checkpoint.folder import finished_results, holds_run, saved_config, was_written_since
from pemt.checkpoint.names import checkpoint_folders
from pemt.checkpoint.status import saved_checkpoint
from pemt.config import PemtError, RunConfig
from pemt.engine import launcher_began
from pemt.storage import StorageError, read_manifest

Config = TypeVar("Config", bound=RunConfig)
RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torch's launcher sets it for each rank


class WorldSizeError(PemtError):
    """A number of ranks on which a run cannot resume."""


@dataclass(frozen=True, kw_only=True)
class Fresh(Generic[Config]):
    """A run that begins at its first step, in a folder that holds no run, or one that it overwrites."""

    config: Config


@dataclass(frozen=True, kw_only=True)
class Resume(Generic[Config]):
    """A run that was begun before.

    Args:
        config: with the precision and the global batch that it was begun with.
        checkpoint: a checkpoint's folder; None for the newest intact one in `output_dir`, which is chosen when the
            folder is locked and the data are known that it must go with.
        notes: in one line each, what is another than the configuration says.
    """

    config: Config
    checkpoint: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished(Generic[Config]):
    """A run with nothing left to do.

    Args:
        results: what its all_results.json holds.
    """

    config: Config
    results: dict[str, Any]


Start: TypeAlias = Fresh[Config] | Resume[Config] | Finished[Config]


def resolve_run(config: Config, *, world_size: int, product: Path | None = None) -> Start[Config]:
    """How a run begins (rank 0 alone decides, for all: a network disk may show others an older folder).

    Nothing is written here.

    Args:
        config: as the user gave it.
        world_size: ranks of this job.
        product: what the run leaves besides its results; without it, it is not finished.

    Raises:
        RunFolderError: `output_dir` holds another run.
        WorldSizeError: the global batch that the run began with cannot be had on this number of ranks.
    """
    config = after_restart(config)
    results = finished_results(config)
    if results is not None and (product is None or product.exists()):
        return Finished(config=config, results=results)
    folder, chosen = Path(config.output_dir), config.resume_from_checkpoint
    checkpoint = chosen if isinstance(chosen, str) else None
    has_run = checkpoint is not None or holds_run(folder) or saved_checkpoint(folder) is not None
    if config.overwrite_output_dir or chosen is False or not has_run:
        return Fresh(config=config)
    manifest = _manifest_to_resume(config)
    config = keep_precision(config, manifest)
    config, notes = keep_global_batch(config, manifest, world_size)
    return Resume(config=config, checkpoint=checkpoint, notes=notes)


def after_restart(config: Config) -> Config:
    """After `--max_restarts` has restarted the ranks, what the first start has done is not undone.

    Where it died before it had written anything, there is nothing of it: what lies in the folder is still the run that
    is to be overwritten.
    """
    if os.environ.get(RESTARTS, "0") == "0":
        return config
    chosen, folder = config.resume_from_checkpoint, Path(config.output_dir)
    began = launcher_began(RESTARTS)
    if config.overwrite_output_dir and began is not None and not was_written_since(folder, began):
        return config
    if config.overwrite_output_dir or (isinstance(chosen, str) and holds_run(folder)):
        return replace(config, overwrite_output_dir=False, resume_from_checkpoint=True)
    return config


def keep_precision(config: Config, manifest: dict[str, Any] | None) -> Config:
    """`bf16` as the run began, where it is left to the device: it may resume on a machine with another one."""
    if config.bf16 is not None:
        return config
    saved = (manifest or {}).get("config")
    if not isinstance(saved, dict):  # no checkpoint yet
        saved = saved_config(Path(config.output_dir)) or {}
    bf16 = saved.get("bf16")
    return replace(config, bf16=bf16 and not config.fp16) if isinstance(bf16, bool) else config


def keep_global_batch(
    config: Config, manifest: dict[str, Any] | None, world_size: int
) -> tuple[Config, tuple[str, ...]]:
    """Accumulate more on fewer ranks and less on more, so that a run keeps its global batch; and a note on it.

    Args:
        manifest: the manifest of the checkpoint to resume from, if there is one.

    Raises:
        WorldSizeError: ranks × batch does not divide it.
    """
    if manifest is None or manifest.get("world_size") == world_size:
        return config, ()
    wanted = manifest["run"].get("global_batch_size")
    at_once = config.per_device_train_batch_size * world_size
    if (
        not isinstance(wanted, int)
        or manifest["run"].get("per_device_train_batch_size") != config.per_device_train_batch_size
        or wanted == at_once * config.gradient_accumulation_steps
    ):
        return config, ()  # nothing to mend, or it is refused when the checkpoint is read
    if wanted % at_once:
        raise WorldSizeError(
            f"{config.output_dir}: the run was started on {manifest['world_size']} rank(s) with a global batch of "
            f"{wanted}, which {world_size} rank(s) × per_device_train_batch_size {config.per_device_train_batch_size} "
            "do not divide; take another number of ranks"
        )
    accumulation = wanted // at_once
    note = (
        f"{config.output_dir}: saved on {manifest['world_size']} rank(s), now on {world_size}: "
        f"gradient_accumulation_steps becomes {accumulation}, so that the global batch stays {wanted}"
    )
    return replace(config, gradient_accumulation_steps=accumulation), (note,)


def _manifest_to_resume(config: RunConfig) -> dict[str, Any] | None:
    """The manifest of the checkpoint to resume from; None where there is none that can be read."""
    chosen = config.resume_from_checkpoint
    newest_first = checkpoint_folders(Path(config.output_dir))[::-1]
    for folder in [Path(chosen)] if isinstance(chosen, str) else newest_first:
        try:
            manifest = read_manifest(folder)
        except StorageError:
            continue
        if isinstance(manifest.get("run"), dict):
            return manifest
    return None
