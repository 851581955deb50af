"""What a run's configuration becomes when the launcher has started it anew, or on another number of ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pemt.checkpoint.folder import begun_config, holds_run, resume_target
from pemt.checkpoint.names import checkpoint_folders
from pemt.config import PemtError, RunConfig
from pemt.storage import StorageError, read_manifest

Config = TypeVar("Config", bound=RunConfig)


class WorldSizeError(PemtError):
    """A number of ranks on which a run cannot go on."""


def resolve_config(config: Config) -> Config:
    """The configuration with which to go on; every rank finds the same, before there are collectives.

    Raises:
        WorldSizeError: the global batch that the run began with cannot be had on this number of ranks.
    """
    config = with_the_same_precision(after_restart(config))
    return with_the_same_batch(config, int(os.environ.get("WORLD_SIZE", "1")))


def after_restart(config: Config) -> Config:
    """After `--max_restarts` has started the ranks anew, what the first start has done is not undone."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    chosen = config.resume_from_checkpoint
    if config.overwrite_output_dir or (
        isinstance(chosen, str) and holds_run(Path(config.output_dir))
    ):
        return replace(config, overwrite_output_dir=False, resume_from_checkpoint=True)
    return config


def with_the_same_precision(config: Config) -> Config:
    """`bf16` as the run began, where it is left to the device: it may go on on a machine with another one."""
    if config.bf16 is not None or not resume_target(config):
        return config
    begun = (_begun(config) or {}).get("config")
    if not isinstance(begun, dict):  # no checkpoint yet
        begun = begun_config(Path(config.output_dir)) or {}
    bf16 = begun.get("bf16")
    return replace(config, bf16=bf16 and not config.fp16) if isinstance(bf16, bool) else config


def with_the_same_batch(config: Config, world_size: int) -> Config:
    """Accumulate more on fewer ranks and less on more, so that a run keeps its global batch.

    Raises:
        WorldSizeError: ranks × batch does not divide it.
    """
    begun = _begun(config)
    if begun is None or begun.get("world_size") == world_size:
        return config
    wanted = begun["run"].get("global_batch_size")
    at_once = config.per_device_train_batch_size * world_size
    if (
        not isinstance(wanted, int)
        or begun["run"].get("per_device_train_batch_size") != config.per_device_train_batch_size
        or wanted == at_once * config.gradient_accumulation_steps
    ):
        return config  # nothing to mend, or what differs will be told when the checkpoint is read
    if wanted % at_once:
        raise WorldSizeError(
            f"{config.output_dir}: the run was begun on {begun['world_size']} rank(s) with a global batch of {wanted}, "
            f"which {world_size} rank(s) × per_device_train_batch_size {config.per_device_train_batch_size} do not "
            "divide; take another number of ranks"
        )
    accumulation = wanted // at_once
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{config.output_dir}: saved on {begun['world_size']} rank(s), now on {world_size}: "
            f"gradient_accumulation_steps becomes {accumulation}, so that the global batch stays {wanted}",
            flush=True,
        )
    return replace(config, gradient_accumulation_steps=accumulation)


def _begun(config: RunConfig) -> dict[str, Any] | None:
    """The manifest of the checkpoint to go on from; None where there is none that can be read."""
    choice = resume_target(config)
    folders = [Path(choice)] if isinstance(choice, str) else []
    if choice is True:
        folders = checkpoint_folders(Path(config.output_dir))[::-1]
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except StorageError:
            continue
        if isinstance(manifest.get("run"), dict):
            return manifest
    return None


def warmup_notes(config: RunConfig, total_steps: int) -> list[str]:
    """What is to be told of a warm-up that does not do what was asked for."""
    steps = config.warmup_steps
    if steps and config.lr_scheduler_type == "constant":
        return [
            f"warmup_steps {steps}: not used, `lr_scheduler_type: constant` has no warm-up; "
            "`constant_with_warmup` has"
        ]
    if steps >= total_steps > 0:
        return [
            f"warmup_steps {steps}: the run has {total_steps} steps, so its learning rate never gets beyond "
            f"{max(total_steps - 1, 0) / steps:.0%} of learning_rate; lower warmup_steps, or train longer"
        ]
    return []
