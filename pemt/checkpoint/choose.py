"""Which checkpoint a run resumes from: intact, of this run, the newest; rank 0 chooses it for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pemt.checkpoint.names import checkpoint_folders, is_checkpoint_name, quarantine, step_of
from pemt.checkpoint.train_state import MOMENTS, RANDOM, WEIGHTS, TrainState, train_state_of
from pemt.config import NON_IDENTITY_FIELDS, PemtError
from pemt.storage import (
    StorageError,
    TensorFile,
    open_tensors,
    read_manifest,
    remove_folder,
    remove_partial_writes,
)

FORMAT = 2


class CheckpointError(PemtError):
    """A checkpoint that does not exist, is damaged, or belongs to another run."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found intact; its tensors are read lazily.

    Args:
        weights: fp32, by the names of `TrainedT5.trainable_parameters`.
        moments: AdamW's, as `<parameter>.<exp_avg|exp_avg_sq>`.
        random: every rank's generators, a row a rank.
        notes: in one line each, which checkpoints were skipped and what has changed since.
    """

    folder: Path
    state: TrainState
    weights: TensorFile
    moments: TensorFile
    random: TensorFile
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointChooser:
    """Finds, among the checkpoints of an output folder, the one to resume from; rank 0 alone calls it.

    Args:
        output_dir: the run's folder.
        config: the run's configuration, as `plain_values` gives it; what has changed is noted.
        identity: what a checkpoint's manifest must say under `run`.
    """

    output_dir: Path
    config: Mapping[str, Any]
    identity: Mapping[str, Any]

    def choose(self, checkpoint: str | None, expected: int | None) -> Checkpoint | None:
        """As `Checkpoints.find`; what a killed save left is removed, and the checkpoints of later steps."""
        remove_partial_writes(self.output_dir, is_checkpoint_name)
        found = self._newest_usable() if checkpoint is None else self._read(Path(checkpoint))
        if found:
            for folder in checkpoint_folders(self.output_dir):
                if (step_of(folder) or 0) > found.state.step:  # these steps will be taken again
                    remove_folder(folder)
            return self._with_intact_best(found)
        if expected is not None:
            raise CheckpointError(
                f"{self.output_dir}: the run here had saved checkpoint-{expected}, and no checkpoint is left; put one "
                "back, or start again with --overwrite_output_dir true"
            )
        return None

    def _with_intact_best(self, found: Checkpoint) -> Checkpoint:
        """Forget a best checkpoint that is damaged or not in this run's folder, with a note.

        The one found counts as not validated then, so that it is a candidate itself.
        """
        best = found.state.best_step
        folder = self.output_dir / f"checkpoint-{best}"
        if best is None or folder.resolve() == found.folder.resolve():
            return found
        try:
            manifest, _ = self._manifest(folder)
            open_tensors(folder, WEIGHTS, manifest)
        except (StorageError, CheckpointError) as error:
            lost = "missing"
            if folder.exists():
                lost = f"{error}; quarantined as {quarantine(folder).name}"
            note = f"checkpoint-{best} was the best so far and is lost: {lost}; the best is chosen again from the rest"
            alone = found.state.without_best()
            return replace(found, state=alone, notes=(*found.notes, note))
        return found

    def _newest_usable(self) -> Checkpoint | None:
        """The newest intact checkpoint of this run; damaged ones are quarantined, each with a note."""
        folders = checkpoint_folders(self.output_dir)
        problems: dict[Path, CheckpointError] = {}
        for folder in reversed(folders):
            try:
                found = self._read(folder)
            except CheckpointError as error:
                problems[folder] = error
                continue
            notes = [
                f"{error}; quarantined as {quarantine(damaged).name}, resuming from {folder.name}"
                for damaged, error in problems.items()
            ]
            return replace(found, notes=(*notes, *found.notes))
        if not problems:
            return None
        first = problems[folders[-1]]
        if not isinstance(first.__cause__, StorageError):
            raise first
        raise CheckpointError(
            f"{self.output_dir}: none of {len(folders)} checkpoints is intact ({first}); "
            "start again with --overwrite_output_dir true"
        )

    def _read(self, folder: Path) -> Checkpoint:
        try:
            manifest, state = self._manifest(folder)
            return Checkpoint(
                folder=folder,
                state=state,
                weights=open_tensors(folder, WEIGHTS, manifest),
                moments=open_tensors(folder, MOMENTS, manifest),
                random=open_tensors(folder, RANDOM, manifest),
                notes=self._changes(manifest),
            )
        except StorageError as error:
            raise CheckpointError(str(error)) from error

    def _manifest(self, folder: Path) -> tuple[dict[str, Any], TrainState]:
        """The manifest of a checkpoint of this run, and the state in it."""
        manifest = read_manifest(folder)
        if manifest.get("format") != FORMAT or not isinstance(manifest.get("run"), dict):
            raise CheckpointError(
                f"{folder}: format {manifest.get('format')}, this version reads format {FORMAT}"
            )
        state = train_state_of(manifest)
        if step_of(folder) not in (None, state.step):
            raise CheckpointError(f"{folder}: its manifest is that of step {state.step}")
        for key, ours in self.identity.items():
            theirs = manifest["run"].get(key)
            if theirs != ours:
                raise CheckpointError(
                    f"{folder}: was saved with {key} {theirs}, this run has {ours}; make them agree or start a new run"
                )
        return manifest, state

    def _changes(self, manifest: dict[str, Any]) -> tuple[str, ...]:
        """A line on the fields that this run sets otherwise than the checkpoint's."""
        before = manifest.get("config")
        if not isinstance(before, dict):
            return ()
        changed = [
            f"{name} {before.get(name)} -> {value}"
            for name, value in self.config.items()
            if before.get(name) != value and name not in NON_IDENTITY_FIELDS
        ]
        return (f"changed since the checkpoint: {', '.join(changed)}",) if changed else ()
