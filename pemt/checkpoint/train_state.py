"""How far a run is, as a checkpoint keeps it beside the tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pemt.storage import StorageError, read_manifest

WEIGHTS, MOMENTS, RANDOM = "trained.safetensors", "moments.safetensors", "random.safetensors"

# Fields that older checkpoints of this format lack.
_ADDED = ("best_loss", "validations", "ended")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a run is.

    Args:
        step: optimizer steps done; the learning rate follows from it, and, but for a stream, the position in
            the data.
        best_metric: best validation `average_metrics` so far, in percent; None before the first.
        best_loss: validation loss of the same step: of equal metrics the lower loss is the better one. None before the
            first, and in checkpoints that were written before it was kept.
        best_step: the step at which it was measured.
        validations: how many were made that the best one is the best of; None in such checkpoints.
        validated_step: the last step that was validated; a run that is stopped before a validation
            makes it when it resumes.
        skipped: steps that changed nothing, since loss or gradient was not finite.
        position: where in a stream the next step begins.
        ended: the step after which a callback has ended the run, which takes no further one; None while none has.
    """

    step: int = 0
    best_metric: float | None = None
    best_loss: float | None = None
    validations: int | None = 0
    best_step: int | None = None
    validated_step: int | None = None
    skipped: int = 0
    position: dict[str, Any] | None = None
    ended: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a manifest keeps, and `train_state_of` reads."""
        return asdict(self)

    def measured(self, metric: float, loss: float) -> TrainState:
        """The state after a validation at this step; the best is the highest metric, of equal ones the lowest loss."""
        count = None if self.validations is None else self.validations + 1
        validated = replace(self, validated_step=self.step, validations=count)
        if self.best_metric is None or merit_of(metric, loss) > merit_of(
            self.best_metric, self.best_loss
        ):
            return replace(validated, best_metric=metric, best_loss=loss, best_step=self.step)
        return validated

    def without_best(self) -> TrainState:
        """The state whose best checkpoint is lost: the best is chosen anew, this step among the candidates."""
        return replace(
            self,
            best_metric=None,
            best_loss=None,
            best_step=None,
            validated_step=None,
            validations=0,
        )


def merit_of(metric: float, loss: float | None) -> tuple[float, float]:
    """What is compared; NaN is the worst there is, and a loss that is not known wins a tie."""
    return _or_worst(metric), math.inf if loss is None else _or_worst(-loss)


def _or_worst(value: float) -> float:
    return value if value == value else -math.inf  # NaN is not


def train_state_of(manifest: dict[str, Any]) -> TrainState:
    """The state in a checkpoint's manifest.

    Raises:
        StorageError: a field is missing, unknown or of another kind.
    """
    found = manifest.get("progress")
    names = [each.name for each in fields(TrainState)]
    if isinstance(found, dict):
        found = {**dict.fromkeys(_ADDED), **found}
    if not isinstance(found, dict) or found.keys() != set(names):
        raise StorageError(f"manifest.json: progress: found {found}, expected {names}")
    for name, value in found.items():
        if value is None and name not in ("step", "skipped"):
            continue
        if name == "position":
            fits, expected = _is_position(value), "a position in the data"
        elif name in ("best_metric", "best_loss"):  # a metric may be negative, or NaN
            fits, expected = type(value) in (int, float), "a number"
        else:
            fits, expected = type(value) is int and value >= 0, "a count"
        if not fits:
            raise StorageError(
                f"manifest.json: progress.{name}: found {value!r}, expected {expected}"
            )
    return TrainState(**found)


def trained_count(folder: Path) -> int | None:
    """How many parameters a checkpoint's run trains; None where it is gone or damaged."""
    try:
        tensors = read_manifest(folder)["files"][WEIGHTS]["tensors"]
    except (StorageError, KeyError):
        return None
    return sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def _is_position(value: Any) -> bool:
    """Whether this is what `StreamBatches.position` gives."""
    counts = ("epoch", "buffer", "done")
    return (
        isinstance(value, dict)
        and value.keys() == {*counts, "state"}
        and all(type(value[name]) is int and value[name] >= 0 for name in counts)
        and isinstance(value["state"], dict | None)
    )
