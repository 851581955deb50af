"""Checkpoints of trainable state only, gathered: they load at any world size and any ZeRO stage.

`checkpoint-<step>/` holds trained.safetensors (fp32 weights), moments.safetensors (AdamW's moments),
random.safetensors (each rank's generators) and the manifest with how far the run is, its configuration
and what it belongs to: 12 bytes per trained parameter.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pemt.checkpoint.choose import FORMAT, Checkpoint, CheckpointChooser, CheckpointError
from pemt.checkpoint.folder import plain_values
from pemt.checkpoint.names import checkpoint_folders, step_of
from pemt.checkpoint.train_state import MOMENTS, RANDOM, WEIGHTS, TrainState
from pemt.checkpoint.writer import BackgroundWriter
from pemt.config import RunConfig
from pemt.model import make_lazy
from pemt.storage import (
    StorageError,
    TensorFile,
    open_tensors,
    read_manifest,
    remove_folder,
    write_folder,
)

if TYPE_CHECKING:  # who only reads a run needs no engine
    from pemt.engine import Engine


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        output_dir: the run's folder.
        engine: gathers what is saved; rank 0 writes, and reads for all.
        config: batch size and accumulation, which fix the order of the data.
        identity: what else must be the same in a run that resumes from one of them.
    """

    def __init__(
        self, output_dir: Path, engine: Engine, config: RunConfig, identity: Mapping[str, Any]
    ) -> None:
        self._output_dir = output_dir
        self._engine = engine
        self._limit = config.save_total_limit
        self._stops = config.save_errors == "stop"
        self._writer = BackgroundWriter()
        # step of the newest one that is whole on the disk; rank 0 knows
        self.saved: int | None = None
        self._chooser = CheckpointChooser(
            output_dir=output_dir,
            config=plain_values(config),
            identity={
                **identity,
                "task_name": config.task_name,
                "model_name_or_path": config.model_name_or_path,
                "data_seed": config.effective_data_seed,
                "max_source_length": config.max_source_length,
                "per_device_train_batch_size": config.per_device_train_batch_size,
                "global_batch_size": config.per_device_train_batch_size
                * config.gradient_accumulation_steps
                * engine.world_size,
            },
        )

    def save(self, state: TrainState) -> None:
        """Begin to write `checkpoint-<step>` and to remove what the limit no longer keeps (all ranks call).

        The copies are made here; a thread of rank 0 writes them. What becomes of that, `lines`, `failure`
        and `finish` tell.

        Raises:
            CheckpointError: the ranks do not agree on how far the run is.
            CheckpointError: a weight or a moment is NaN or Inf; the checkpoint before stays.
        """
        began = time.perf_counter()
        self._engine.on_rank0(self._writer.wait, "writing the previous checkpoint")
        files = {
            WEIGHTS: self._engine.optimizer_state.weights(),
            MOMENTS: self._engine.optimizer_state.moments(),
            RANDOM: self._engine.random_states(),
        }
        self._check_ranks_agree(state, {**files[WEIGHTS], **files[MOMENTS]})
        if not self._engine.is_main:
            return
        manifest = {
            "format": FORMAT,
            "run": self._chooser.identity,
            "config": self._chooser.config,
            "progress": state.state_dict(),
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.zero_stage,
        }

        def write() -> Path:
            folder = self._output_dir / f"checkpoint-{state.step}"
            write_folder(folder, files, manifest)
            self.saved = max(state.step, self.saved or 0)
            self._remove_old(state)
            return folder

        blocked_seconds = time.perf_counter() - began
        self._writer.write(
            state.step, write, blocked_seconds=blocked_seconds, needed=state.best_step
        )

    def _check_ranks_agree(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Every rank must be where rank 0 is, with finite weights and moments (all ranks call)."""
        bad = None
        if self._engine.is_main:  # its copies are what is written
            bad = next((name for name, each in tensors.items() if not each.isfinite().all()), None)
        self._engine.barrier()
        # As text, in which NaN equals NaN: a metric may be one.
        votes = self._engine.all_gather_object(
            (json.dumps(state.state_dict(), sort_keys=True), bad)
        )
        first, bad = votes[0]
        for rank, (theirs, _) in enumerate(votes):
            if theirs != first:
                raise CheckpointError(
                    f"checkpoint-{state.step} was not saved: rank {rank} is at {theirs}, rank 0 at {first}; "
                    "run the same command again to resume from the previous checkpoint"
                )
        if bad is not None:
            raise CheckpointError(
                f"checkpoint-{state.step} was not saved: `{bad}` holds NaN or Inf; resume from "
                "the previous checkpoint with a lower learning_rate, or train in fp32"
            )

    def lines(self) -> list[str]:
        """What to log about saving since the last call; on rank 0."""
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

    def _remove_old(self, state: TrainState) -> None:
        keep = {state.step, state.best_step}
        for folder in checkpoint_folders(self._output_dir)[: -self._limit]:
            if step_of(folder) not in keep:
                remove_folder(folder)

    def best_weights(self, state: TrainState) -> TensorFile:
        """The trained weights of the best checkpoint, or of the newest where nothing was validated (all ranks call).

        Raises:
            CheckpointError: it is damaged, or a rank does not see it.
        """
        step = state.step if state.best_step is None else state.best_step
        folder = self._output_dir / f"checkpoint-{step}"

        def find() -> TensorFile:
            try:
                return open_tensors(folder, WEIGHTS, read_manifest(folder))
            except StorageError as error:
                raise CheckpointError(
                    f"{error}; run the same command again: it resumes without this checkpoint"
                ) from None

        return self._check_visible(self._engine.on_rank0(find, "checking the best checkpoint"))

    def _check_visible(self, file: TensorFile) -> TensorFile:
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

    def find(self, checkpoint: str | None, *, expected: int | None = None) -> Checkpoint | None:
        """The checkpoint to resume from, chosen and checked by rank 0 for all; nothing is loaded (all ranks call).

        Args:
            checkpoint: a checkpoint's folder; None for the newest intact one, if the run has left any.
            expected: step of a checkpoint that the run is known to have written, on rank 0.

        Raises:
            CheckpointError: the chosen one is damaged or of another run, none of several is intact, all
                are gone, or a rank does not see it.
        """
        found = self._engine.on_rank0(
            lambda: self._chooser.choose(checkpoint, expected),
            "checking the checkpoint to resume from",
        )
        if found is not None:
            for file in (found.weights, found.moments, found.random):
                self._check_visible(file)
            if found.folder.resolve().parent == self._output_dir.resolve():
                self.saved = found.state.step
        return found


def load_lazily(weights: TensorFile, trained: Mapping[str, nn.Parameter]) -> None:
    """Have a checkpoint's weights take the place of the model's; each is read when `Engine.prepare` places it.

    Raises:
        CheckpointError: the checkpoint trains other tensors than this run.
    """
    theirs = weights.shapes()
    ours = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{weights.path}: tensor `{name}` is {theirs.get(name, 'missing')} there and "
                f"{ours.get(name, 'not trained')} in this run; use the run's own configuration"
            )
    for name, parameter in trained.items():
        make_lazy(parameter, partial(weights.__getitem__, name))
