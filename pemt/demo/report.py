"""What the demo shows: a table, report.json and a heat map of the gates."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.image import imsave

from pemt.demo.tasks import RELATED
from pemt.monitor import NamedGates, gate_map, mean_by_source

REPORT, HEAT_MAP = "report.json", "gates.png"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stage 2 run's outcome on its test set."""

    method: str
    target: str
    seed: int
    accuracy: float
    gate_weights: dict[str, float]
    gates: NamedGates

    @classmethod
    def of(cls, method: str, target: str, seed: int, results: dict[str, Any]) -> Row:
        """From what `run_adapt` returned."""
        return cls(
            method=method,
            target=target,
            seed=seed,
            accuracy=results["test_accuracy"],
            gate_weights=mean_by_source(results["gates"]),
            gates=results["gates"],
        )


def write_report(rows: list[Row], sources: dict[str, float], output_dir: Path) -> None:
    """Write report.json and gates.png, and print the table.

    Args:
        rows: the stage 2 runs.
        sources: each source task's test accuracy after stage 1, in percent.
        output_dir: receives both files.
    """
    summary = [summary_of(rows, target) for target in dict.fromkeys(row.target for row in rows)]
    content = {
        "sources": sources,
        "rows": [asdict(row) for row in rows],
        "summary": summary,
        "mean_gain": mean(each["gain"] for each in summary),
        "heat_map": HEAT_MAP,
        "tensorboard": str(output_dir),
    }
    (output_dir / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw_heat_map(rows, output_dir / HEAT_MAP)
    print("\n".join(table(summary, _methods(rows))))
    print(f"mean gain over the adapter alone {content['mean_gain']:+.1f} points")
    learned = ", ".join(f"{name} {accuracy:.1f}" for name, accuracy in sources.items())
    print(f"test accuracy of the sources after stage 1: {learned}")
    print(
        f"{output_dir / REPORT}, {output_dir / HEAT_MAP}; tensorboard --logdir {output_dir}",
        flush=True,
    )


def summary_of(rows: list[Row], target: str) -> dict[str, Any]:
    """Means over seeds of one target: every method's accuracy, and PEMT's gate weight per source."""
    ours = [row for row in rows if row.target == target and row.method == "pemt"]
    accuracy = {
        method: mean(row.accuracy for row in rows if (row.target, row.method) == (target, method))
        for method in _methods(rows)
    }
    return {
        "target": target,
        "related_source": RELATED[target],
        **accuracy,
        "gain": accuracy["pemt"] - accuracy["adapter"],
        "gate_weights": {
            name: mean(row.gate_weights[name] for row in ours) for name in ours[0].gate_weights
        },
    }


def _methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.method for row in rows))


def table(summary: list[dict[str, Any]], methods: list[str]) -> list[str]:
    """The summary as lines of text; a star marks the source that a target was built to resemble."""
    sources = list(summary[0]["gate_weights"])
    head = (
        f"{'target':<10}"
        + "".join(f"{method:>9}" for method in methods)
        + f"{'gain':>8}   gate weight of "
        + "".join(f"{name:>9}" for name in sources)
    )
    lines = [head]
    for each in summary:
        gates = "".join(
            f"{weight:>8.2f}{'*' if name == each['related_source'] else ' '}"
            for name, weight in each["gate_weights"].items()
        )
        scores = "".join(f"{each[method]:>9.1f}" for method in methods)
        lines.append(f"{each['target']:<10}{scores}{each['gain']:>+8.1f}{'':<18}{gates}")
    return lines


def draw_heat_map(rows: list[Row], path: Path) -> None:
    """Per target, one above the other, the mean gate over seeds of every FFN (rows) and source (columns)."""
    maps = []
    for target in dict.fromkeys(row.target for row in rows):
        ours = [row.gates for row in rows if row.target == target and row.method == "pemt"]
        means = {
            site: {name: mean(gates[site][name] for gates in ours) for name in weights}
            for site, weights in ours[0].items()
        }
        maps.append(gate_map(means, title=f"{target} (related source: {RELATED[target]})"))
    imsave(path, np.concatenate(maps))
