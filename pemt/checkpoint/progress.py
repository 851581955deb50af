"""What a checkpoint's manifest tells without its tensors: how far the run is, how much it trains."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

from pemt.storage import StorageError, read_manifest

WEIGHTS, MOMENTS, RANDOM = "trained.safetensors", "moments.safetensors", "random.safetensors"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Args:
        step: optimizer steps done; the position in the data follows from it, but for a stream.
        best_metric: best validation `average_metrics` so far, in percent; None before the first.
        best_step: the step at which it was measured.
        validated_step: the last step that was validated; a run that is stopped before a validation
            makes it when it goes on.
        skipped: steps that changed nothing, since loss or gradient was not finite.
        position: where in a stream the next step begins.
    """

    step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    validated_step: int | None = None
    skipped: int = 0
    position: dict[str, Any] | None = None

    def measured(self, metric: float) -> Progress:
        """Progress after a validation at this step."""
        validated = replace(self, validated_step=self.step)
        if self.best_metric is None or metric > self.best_metric:
            return replace(validated, best_metric=metric, best_step=self.step)
        return validated


def progress_of(manifest: dict[str, Any]) -> Progress:
    """The progress that a checkpoint's manifest tells.

    Raises:
        StorageError: a field is missing, unknown or of another kind.
    """
    found = manifest.get("progress")
    names = [each.name for each in fields(Progress)]
    if not isinstance(found, dict) or found.keys() != set(names):
        raise StorageError(f"manifest.json: progress: found {found}, expected {names}")
    position = found["position"]
    if position is not None and not _is_position(position):
        raise StorageError(f"manifest.json: progress.position: found {position!r}, which is none")
    for name, value in found.items():
        if name == "position":
            continue
        optional = name not in ("step", "skipped")
        kinds = (int, float) if name == "best_metric" else (int,)
        if not (optional and value is None) and (type(value) not in kinds or value < 0):
            raise StorageError(
                f"manifest.json: progress.{name}: found {value!r}, expected a number"
            )
    return Progress(**found)


def trained_count(folder: Path) -> int | None:
    """How many parameters a checkpoint's run trains; None where it is gone or damaged."""
    try:
        tensors = read_manifest(folder)["files"][WEIGHTS]["tensors"]
    except (StorageError, KeyError):
        return None
    return sum(prod(tensor["shape"]) for tensor in tensors.values())


def _is_position(value: Any) -> bool:
    """Whether this is what `StreamBatches.position` gives."""
    counts = ("epoch", "buffer", "done")
    return (
        isinstance(value, dict)
        and value.keys() == {*counts, "state"}
        and all(type(value[name]) is int and value[name] >= 0 for name in counts)
        and isinstance(value["state"], dict | None)
    )
