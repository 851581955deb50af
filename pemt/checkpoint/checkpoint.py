"""Checkpoints of trainable state only, gathered: they load at any world size and any ZeRO stage.

`checkpoint-<step>/` holds trained.safetensors (fp32 weights), moments.safetensors (AdamW's moments),
random.safetensors (each rank's generators) and the manifest with the run's progress, configuration
and what it belongs to: 12 bytes per trained parameter.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pemt.checkpoint.names import checkpoint_folders, is_checkpoint_name, quarantine, step_of
from pemt.checkpoint.train_state import (
    MOMENTS,
    RANDOM,
    WEIGHTS,
    TrainState,
    train_state_of,
)
from pemt.checkpoint.writer import BackgroundWriter, Snapshot
from pemt.config import NON_IDENTITY_FIELDS, PemtError, RunConfig
from pemt.model import make_lazy, materialize
from pemt.storage import (
    StorageError,
    TensorFile,
    open_tensors,
    read_manifest,
    remove_folder,
    remove_partial_writes,
    write_folder,
)

if TYPE_CHECKING:  # who only reads a run needs no engine
    from pemt.engine import Engine

FORMAT = 2


class CheckpointError(PemtError):
    """A checkpoint that does not exist, is damaged, or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found whole; its tensors stay in their files until they are asked for.

    Args:
        weights: fp32, by the names of `TrainedT5.trainable_parameters`.
        moments: AdamW's, as `<parameter>.<exp_avg|exp_avg_sq>`.
        random: every rank's generators, a row a rank.
        notes: in one line each, what was passed over on the way to it and what has changed since.
    """

    folder: Path
    progress: TrainState
    weights: TensorFile
    moments: TensorFile
    random: TensorFile
    notes: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        output_dir: the run's folder.
        engine: gathers what is saved; rank 0 writes, and reads for all.
        config: batch size and accumulation, which fix the order of the data.
        identity: what else must be the same in a run that goes on from one of them.
    """

    def __init__(
        self, output_dir: Path, engine: Engine, config: RunConfig, identity: Mapping[str, Any]
    ) -> None:
        self._output_dir = output_dir
        self._engine = engine
        self._limit = config.save_total_limit
        self._stops = config.save_errors == "stop"
        self._writer = BackgroundWriter()
        self.saved: int | None = (
            None  # step of the newest one that is whole on the disk; rank 0 knows
        )
        self._config = plain_values(config)
        self._run = {
            **identity,
            "task_name": config.task_name,
            "model_name_or_path": config.model_name_or_path,
            "data_seed": config.effective_data_seed,
            "max_source_length": config.max_source_length,
            "per_device_train_batch_size": config.per_device_train_batch_size,
            "global_batch_size": config.per_device_train_batch_size
            * config.gradient_accumulation_steps
            * engine.world_size,
        }

    def save(self, progress: TrainState) -> None:
        """Begin to write `checkpoint-<step>` and to remove what the limit no longer keeps (all ranks call).

        The copies are made here; a thread of rank 0 writes them. What becomes of that, `lines`, `failure`
        and `finish` tell.

        Raises:
            CheckpointError: the ranks do not agree on how far the run is.
            CheckpointError: a weight or a moment is NaN or Inf; the checkpoint before stays.
        """
        began = time.perf_counter()
        self._engine.on_rank0(self._writer.wait, "writing the checkpoint before")
        files = {
            WEIGHTS: self._engine.trained.weights(),
            MOMENTS: self._engine.trained.moments(),
            RANDOM: self._engine.random_states(),
        }
        self._vote(progress, {**files[WEIGHTS], **files[MOMENTS]})
        if not self._engine.is_main:
            return
        manifest = {
            "format": FORMAT,
            "run": self._run,
            "config": self._config,
            "progress": progress.state_dict(),
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.zero_stage,
        }

        def write() -> Path:
            folder = self._output_dir / f"checkpoint-{progress.step}"
            write_folder(folder, files, manifest)
            self.saved = max(progress.step, self.saved or 0)
            self._remove_old(progress)
            return folder

        blocked_seconds = time.perf_counter() - began
        snapshot = Snapshot(step=progress.step, write=write, blocked_seconds=blocked_seconds)
        self._writer.write(snapshot, needed=progress.best_step)

    def _vote(self, progress: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Every rank must be where rank 0 is, with numbers that can be gone on with (all ranks call)."""
        bad = None
        if self._engine.is_main:  # its copies are what is written
            bad = next((name for name, each in tensors.items() if not each.isfinite().all()), None)
        self._engine.barrier()
        # As text, in which NaN equals NaN: a metric may be one.
        votes = self._engine.all_gather_object(
            (json.dumps(progress.state_dict(), sort_keys=True), bad)
        )
        first, bad = votes[0]
        for rank, (theirs, _) in enumerate(votes):
            if theirs != first:
                raise CheckpointError(
                    f"checkpoint-{progress.step} was not saved: rank {rank} is at {theirs}, rank 0 at {first}; "
                    "start the same command again, to go on from the checkpoint before"
                )
        if bad is not None:
            raise CheckpointError(
                f"checkpoint-{progress.step} was not saved: `{bad}` holds NaN or Inf; go on from "
                "the checkpoint before with a lower learning_rate, or train in fp32"
            )

    def lines(self) -> list[str]:
        """What is to be told about saving since the last call; on rank 0."""
        return self._writer.lines()

    def failure(self) -> StorageError | None:
        """Why the run must end: the last save failed, and `save_errors` says stop; on rank 0."""
        return self._writer.error if self._stops else None

    def finish(self) -> None:
        """Wait until all is written, and try again what was not (all ranks call).

        Raises:
            StorageError: the newest or the best checkpoint could not be written.
        """
        self._engine.on_rank0(self._writer.finish, "writing the last checkpoint")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        # An error ends the process a moment later, and a half-written save with it.
        self._writer.wait()

    def _remove_old(self, progress: TrainState) -> None:
        keep = {progress.step, progress.best_step}
        for folder in checkpoint_folders(self._output_dir)[: -self._limit]:
            if step_of(folder) not in keep:
                remove_folder(folder)

    def best_weights(self, progress: TrainState) -> TensorFile:
        """The trained weights of the best checkpoint, or of the newest where nothing was validated (all ranks call).

        Raises:
            CheckpointError: it is damaged, or a rank does not see it.
        """
        step = progress.step if progress.best_step is None else progress.best_step
        folder = self._output_dir / f"checkpoint-{step}"

        def find() -> TensorFile:
            try:
                return open_tensors(folder, WEIGHTS, read_manifest(folder))
            except StorageError as error:
                raise CheckpointError(
                    f"{error}; start the same command again, which goes on without this checkpoint"
                ) from None

        return self._seen_by_all(self._engine.on_rank0(find, "checking the best checkpoint"))

    def _seen_by_all(self, file: TensorFile) -> TensorFile:
        """Every rank reads for itself what it needs of a file that rank 0 has chosen (all ranks call)."""
        with self._engine.together(f"looking for {file.path}"):
            sees = file.wait_until_visible()
        seen = self._engine.all_gather_object((socket.gethostname(), sees))
        blind = [f"{rank} ({host})" for rank, (host, sees) in enumerate(seen) if not sees]
        if blind:
            raise CheckpointError(
                f"output_dir: rank {', '.join(blind)} does not see {file.path}, which rank 0 has chosen; give an "
                "output_dir on a disk that all machines share"
            )
        return file

    def resume(self, choice: str | bool, *, expected: int | None = None) -> Checkpoint | None:
        """The checkpoint to resume from, chosen and checked by rank 0 for all (all ranks call).

        Args:
            choice: a checkpoint's folder, or True for the newest one that is whole; a folder that holds no
                run yet gives None, so that one command both starts a run and takes it up again. False: none.
            expected: step of a checkpoint that the run is known to have written, on rank 0.

        Raises:
            CheckpointError: the chosen one is damaged or of another run, none of several is whole, all
                are gone, or a rank does not see it.
        """
        found = self._engine.on_rank0(
            lambda: self._choose(choice, expected), "checking the checkpoint to resume from"
        )
        if found is not None:
            for file in (found.weights, found.moments, found.random):
                self._seen_by_all(file)
        return found

    def _choose(self, choice: str | bool, expected: int | None) -> Checkpoint | None:
        remove_partial_writes(self._output_dir, is_checkpoint_name)
        if not choice:
            return None
        found = self._newest_usable() if choice is True else self._read(Path(str(choice)))
        if found:
            self._remove_later(found.progress)
            if found.folder.resolve().parent == self._output_dir.resolve():
                self.saved = found.progress.step
            return self._with_whole_best(found)
        if expected is not None:
            raise CheckpointError(
                f"{self._output_dir}: the run here had saved checkpoint-{expected}, and no checkpoint is left; put one "
                "back, or start again with --overwrite_output_dir true"
            )
        return None

    def _remove_later(self, progress: TrainState) -> None:
        """Checkpoints of steps that will be taken again."""
        for folder in checkpoint_folders(self._output_dir):
            if (step_of(folder) or 0) > progress.step:
                remove_folder(folder)

    def _with_whole_best(self, found: Checkpoint) -> Checkpoint:
        """Forget a best checkpoint that is damaged or not in this run's folder, and tell of it.

        The one found counts as not validated then, so that it is a candidate itself.
        """
        best = found.progress.best_step
        folder = self._output_dir / f"checkpoint-{best}"
        if best is None or folder.resolve() == found.folder.resolve():
            return found
        try:
            manifest = read_manifest(folder)
            self._check(folder, manifest)
            open_tensors(folder, WEIGHTS, manifest)
        except (StorageError, CheckpointError) as error:
            lost = "it is not there"
            if folder.exists():
                lost = f"{error}; it was put aside as {quarantine(folder).name}"
            note = f"checkpoint-{best} was the best so far, and is lost: {lost}; the best is chosen anew"
            alone = found.progress.without_best()
            return replace(found, progress=alone, notes=(*found.notes, note))
        return found

    def _newest_usable(self) -> Checkpoint | None:
        """The newest whole checkpoint of this run; those passed over are put aside, and told of."""
        folders = checkpoint_folders(self._output_dir)
        problems: dict[Path, CheckpointError] = {}
        for folder in reversed(folders):
            try:
                found = self._read(folder)
            except CheckpointError as error:
                problems[folder] = error
                continue
            notes = [
                f"{error}; it was put aside as {quarantine(damaged).name}, going on from {folder.name}"
                for damaged, error in problems.items()
            ]
            return replace(found, notes=(*notes, *found.notes))
        if not problems:
            return None
        first = problems[folders[-1]]
        if not isinstance(first.__cause__, StorageError):
            raise first
        raise CheckpointError(
            f"{self._output_dir}: none of {len(folders)} checkpoints is whole ({first}); "
            "start again with --overwrite_output_dir true"
        )

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest = read_manifest(folder)
            self._check(folder, manifest)
            return Checkpoint(
                folder=folder,
                progress=train_state_of(manifest),
                weights=open_tensors(folder, WEIGHTS, manifest),
                moments=open_tensors(folder, MOMENTS, manifest),
                random=open_tensors(folder, RANDOM, manifest),
                notes=self._changes(manifest),
            )
        except StorageError as error:
            raise CheckpointError(str(error)) from error

    def _check(self, folder: Path, manifest: dict[str, Any]) -> None:
        if manifest.get("format") != FORMAT or not isinstance(manifest.get("run"), dict):
            raise CheckpointError(
                f"{folder}: format {manifest.get('format')}, this version reads format {FORMAT}"
            )
        progress = train_state_of(manifest)
        if step_of(folder) not in (None, progress.step):
            raise CheckpointError(f"{folder}: its manifest is that of step {progress.step}")
        for key, ours in self._run.items():
            theirs = manifest["run"].get(key)
            if theirs != ours:
                raise CheckpointError(
                    f"{folder}: was saved with {key} {theirs}, this run has {ours}; make them agree or start a new run"
                )

    def _changes(self, manifest: dict[str, Any]) -> tuple[str, ...]:
        """A line on the fields that this run sets otherwise than the checkpoint's."""
        before = manifest.get("config")
        if not isinstance(before, dict):
            return ()
        changed = [
            f"{name} {before.get(name)} -> {value}"
            for name, value in self._config.items()
            if before.get(name) != value and name not in NON_IDENTITY_FIELDS
        ]
        return (f"changed since the checkpoint: {', '.join(changed)}",) if changed else ()


def plain_values(config: RunConfig) -> dict[str, Any]:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(asdict(config)))


def load_into_model(checkpoint: Checkpoint, trained: dict[str, torch.nn.Parameter]) -> None:
    """Have a checkpoint's weights take the place of the model's, each when the engine reads it.

    Raises:
        CheckpointError: the checkpoint trains other tensors than this run.
    """
    _check_shapes(checkpoint.weights.shapes(), trained, where="checkpoint")
    for name, parameter in trained.items():
        make_lazy(parameter, partial(checkpoint.weights.__getitem__, name))


def load_trained(
    weights: Mapping[str, Tensor], trained: Mapping[str, torch.nn.Parameter], *, where: str
) -> None:
    """Copy trained weights into a model that is not prepared yet.

    Args:
        weights, trained: by parameter name; both must have the same names and shapes.
        where: what the weights were read from, for the error.

    Raises:
        CheckpointError: they do not.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    _check_shapes(shapes, trained, where=where)
    for name, parameter in trained.items():
        materialize(parameter, weights[name].to(parameter, copy=True))


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    trained: Mapping[str, torch.nn.Parameter],
    *,
    where: str,
) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    for name in sorted(shapes.keys() ^ wanted.keys()) or [
        key for key in wanted if shapes[key] != wanted[key]
    ]:
        raise CheckpointError(
            f"{where}: tensor `{name}` is {shapes.get(name, 'missing')} there and "
            f"{wanted.get(name, 'not trained')} in this run; use the run's own configuration"
        )
