"""What a run leaves when it is done: scores under their published names, predictions, the block on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from pemt.checkpoint import Progress, RunFolderError
from pemt.run.evaluate import Evaluation
from pemt.storage import write_text
from pemt.tasks import Task, example_scores


def results_of(
    tested: Evaluation, *, progress: Progress, epoch: float, source_names: Sequence[str]
) -> dict[str, Any]:
    """The final report under its published names, with the sources that `moe_weight_k` speaks of."""
    return {
        "epoch": epoch,
        **scores_of(tested, source_names, split="test"),
        "best_checkpoint": f"checkpoint-{progress.step if progress.best_step is None else progress.best_step}",
        "best_validation_average_metrics": progress.best_metric,
    }


def scores_of(scored: Evaluation, source_names: Sequence[str], *, split: str) -> dict[str, Any]:
    """An evaluation under the published names, which begin with the split's."""
    scores = {
        **scored.metrics,
        "loss": scored.loss,
        **{f"moe_weight_{k}": weight for k, weight in enumerate(scored.moe_weights())},
        "runtime": scored.runtime,
        "samples_per_second": scored.samples_per_second,
    }
    return {
        **{f"{split}_{name}": value for name, value in scores.items()},
        "sources": list(source_names),
        # per FFN, the encoder's first, the mean gate of each source
        "gates": [] if scored.gates_LK is None else scored.gates_LK.tolist(),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a report as JSON (rank 0 calls).

    Raises:
        RunFolderError: it cannot be written.
    """
    _write(path, json.dumps(results, indent=2) + "\n")


def write_predictions(
    path: Path, scored: Evaluation, dataset: Dataset, task: Task, source_names: Sequence[str]
) -> None:
    """Write what was predicted, a line of JSON for every example, in the data set's order (rank 0 calls).

    A line has `input`, `target`, `references`, `prediction`, `scores` (what the example scores alone, 0 to 100; empty
    for a regression), `gates` (source -> weight, averaged over all FFNs; empty without experts), and `group` where
    examples are scored together.

    Raises:
        RunFolderError: it cannot be written.
    """
    gates_NLK = scored.gates_NLK
    gates = [[]] * len(dataset) if gates_NLK is None else gates_NLK.mean(dim=1).tolist()
    lines = []
    for row, prediction, gates_K in zip(dataset, scored.predictions, gates, strict=True):
        references = list(row["references"])
        line = {
            "input": row["source"],
            "target": row["target"],
            "references": references,
            "prediction": prediction,
            "scores": example_scores(task, prediction, references),
            "gates": {
                name: round(weight, 4) for name, weight in zip(source_names, gates_K, strict=True)
            },
            **({"group": row["group"]} if row["group"] else {}),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    _write(path, "".join(lines))


def results_block(results: dict[str, Any], split: str = "test") -> str:
    """The final report as the published code prints it: names and aligned values, and whose weight a weight is."""
    sources = {f"{split}_moe_weight_{k}": name for k, name in enumerate(results["sources"])}
    rows = {
        name: value
        for name, value in results.items()
        if name == "epoch" or name.startswith(f"{split}_")
    }
    texts = {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in rows.items()
    }
    name_width, value_width = max(map(len, texts)), max(map(len, texts.values()))
    lines = [
        f"  {name:<{name_width}} = {text:>{value_width}}{f'  {sources[name]}' if name in sources else ''}"
        for name, text in texts.items()
    ]
    return "\n".join([f"***** {split} metrics *****", *lines])


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None
