"""What a run gives back in Python: typed, and a mapping with the keys of `all_results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pemt.checkpoint import PREDICTIONS
from pemt.tasks import metrics_of


class RunResults(dict[str, Any]):
    """What a finished run has left. As a mapping it is what `all_results.json` holds: `results["test_accuracy"]`.

    Args:
        values: these.
        output_dir: the run's folder.
    """

    def __init__(self, values: Mapping[str, Any], output_dir: str | Path) -> None:
        super().__init__(values)
        self.output_dir = Path(output_dir)

    @property
    def metrics(self) -> dict[str, float]:
        """The test set's metrics by name, the task's in percent; a caller's own as they give them."""
        scores = {
            name.removeprefix("test_"): value
            for name, value in self.items()
            if name.startswith("test_")
        }
        return metrics_of(scores)

    @property
    def average_metrics(self) -> float:
        """Their mean (where a caller has given metrics, of these alone): what chose the checkpoint on validation."""
        return float(self["test_average_metrics"])

    @property
    def loss(self) -> float:
        """Cross-entropy per target token on the test set."""
        return float(self["test_loss"])

    @property
    def epoch(self) -> float:
        """Passes over the training data."""
        return float(self["epoch"])

    @property
    def moe_weights(self) -> dict[str, float]:
        """Source task -> its gate's mean over the sites that have it and test examples; empty without experts."""
        return {name: self[f"test_moe_weight_{k}"] for k, name in enumerate(self["sources"])}

    @property
    def gates(self) -> dict[str, dict[str, float]]:
        """Site (`encoder/0` …) -> source task -> its gate's mean over the test examples."""
        return dict(self["gates"])

    @property
    def best_checkpoint(self) -> Path:
        """The folder whose weights were tested."""
        return self.output_dir / self["best_checkpoint"]

    @property
    def best_validation_metric(self) -> float | None:
        """Validation's `average_metrics` of that checkpoint; None where nothing was validated."""
        value: float | None = self["best_validation_average_metrics"]
        return value

    @property
    def predictions(self) -> Path:
        """A line of JSON for every test example."""
        return self.output_dir / PREDICTIONS


class SourceResults(RunResults):
    """What stage 1 has left: its results, and the bank's entry, which is also what it is as a path.

    Args:
        values, output_dir: as of `RunResults`.
        entry: the folder of the expert in the bank.
    """

    def __init__(self, values: Mapping[str, Any], output_dir: str | Path, entry: Path) -> None:
        super().__init__(values, output_dir)
        self.entry = entry

    def __fspath__(self) -> str:
        return str(self.entry)
