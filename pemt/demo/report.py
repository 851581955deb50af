"""What the demo shows: a table, report.json and a heat map of the gates.

Shapes: L FFNs (encoder first), K sources.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pemt.demo.tasks import RELATED

REPORT, HEAT_MAP = "report.json", "gates.png"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage 2 run's outcome on its test set."""

    method: str
    target: str
    seed: int
    accuracy: float
    gate_weights: dict[str, float]
    gates_LK: list[list[float]]

    @classmethod
    def of(cls, method: str, target: str, seed: int, results: dict[str, Any]) -> Row:
        """From what `run_adapt` returned."""
        sources = results["sources"]
        weights = {name: results[f"test_moe_weight_{k}"] for k, name in enumerate(sources)}
        return cls(
            method=method,
            target=target,
            seed=seed,
            accuracy=results["test_accuracy"],
            gate_weights=weights,
            gates_LK=results["gates"],
        )


def write_report(rows: list[Row], output_dir: Path) -> None:
    """Write report.json and gates.png, and print the table."""
    summary = [summary_of(rows, target) for target in dict.fromkeys(row.target for row in rows)]
    content = {
        "rows": [asdict(row) for row in rows],
        "summary": summary,
        "mean_gain": mean(each["gain"] for each in summary),
        "heat_map": HEAT_MAP,
        "tensorboard": str(output_dir),
    }
    (output_dir / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_heat_map(rows, output_dir / HEAT_MAP)
    print("\n".join(table(summary)))
    print(f"mean gain {content['mean_gain']:+.1f} points")
    print(
        f"{output_dir / REPORT}, {output_dir / HEAT_MAP}; tensorboard --logdir {output_dir}",
        flush=True,
    )


def summary_of(rows: list[Row], target: str) -> dict[str, Any]:
    """Means over seeds of one target: both methods' accuracy, and PEMT's gate weight per source."""
    ours = [row for row in rows if row.target == target and row.method == "pemt"]
    accuracy = {
        method: mean(row.accuracy for row in rows if (row.target, row.method) == (target, method))
        for method in ("pemt", "adapter")
    }
    return {
        "target": target,
        "related_source": RELATED[target],
        "pemt": accuracy["pemt"],
        "adapter": accuracy["adapter"],
        "gain": accuracy["pemt"] - accuracy["adapter"],
        "gate_weights": {
            name: mean(row.gate_weights[name] for row in ours) for name in ours[0].gate_weights
        },
    }


def table(summary: list[dict[str, Any]]) -> list[str]:
    """The summary as lines of text; a star marks the source that a target was built to resemble."""
    sources = list(summary[0]["gate_weights"])
    head = f"{'target':<10}{'pemt':>8}{'adapter':>9}{'gain':>8}   gate weight of " + "".join(
        f"{name:>9}" for name in sources
    )
    lines = [head]
    for each in summary:
        gates = "".join(
            f"{weight:>8.2f}{'*' if name == each['related_source'] else ' '}"
            for name, weight in each["gate_weights"].items()
        )
        lines.append(
            f"{each['target']:<10}{each['pemt']:>8.1f}{each['adapter']:>9.1f}{each['gain']:>+8.1f}"
            f"{'':<18}{gates}"
        )
    return lines


def draw_heat_map(rows: list[Row], path: Path) -> None:
    """Per target, the mean gate over seeds of every source (rows) and FFN (columns)."""
    targets = list(dict.fromkeys(row.target for row in rows))
    figure = Figure(figsize=(8, 0.8 + 2.2 * len(targets)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, target in zip(
        figure.subplots(len(targets), squeeze=False)[:, 0], targets, strict=True
    ):
        ours = [row for row in rows if row.target == target and row.method == "pemt"]
        gates_LK = np.mean([row.gates_LK for row in ours], axis=0)
        half = len(gates_LK) // 2
        image = axes.imshow(gates_LK.T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(f"{target} (related source: {RELATED[target]})")
        axes.set_yticks(range(gates_LK.shape[1]), list(ours[0].gate_weights))
        layers = [f"encoder {i}" for i in range(half)] + [
            f"decoder {i}" for i in range(len(gates_LK) - half)
        ]
        axes.set_xticks(range(len(layers)), layers)
        for (layer, source), weight in np.ndenumerate(gates_LK):
            shade = "white" if weight < 0.6 else "black"
            axes.text(layer, source, f"{weight:.2f}", ha="center", va="center", color=shade)
        figure.colorbar(image, ax=axes, label="mean gate")
    figure.savefig(path, dpi=150)
