"""What a run leaves when it is done: scores under their published names, predictions, the block on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pemt.checkpoint import RunFolderError
from pemt.monitor import GateNames
from pemt.run.evaluate import Evaluation
from pemt.run.loop import FitResult
from pemt.run.prepare import Setup
from pemt.storage import write_text
from pemt.tasks import example_scores, metrics_of, without_redundant_mean


def final_results(setup: Setup, fitted: FitResult, tested: Evaluation) -> dict[str, Any]:
    """The final report under its published names, with the sources that `moe_weight_k` speaks of.

    It also tells what was scored (`split`, `examples`, `split_origin`) and how the checkpoint was chosen: by the mean
    of a Python caller's metrics, else of the task's.
    """
    state, data = fitted.state, setup.data
    first, *others = setup.caller.metrics or metrics_of(tested.metrics)
    return {
        "epoch": fitted.epoch,
        **named_scores(tested, setup.built.gate_names, split="test"),
        "split": "test",
        "examples": len(tested.predictions),
        "split_origin": data.origins["test"],
        "best_checkpoint": f"checkpoint-{state.step if state.best_step is None else state.best_step}",
        "best_validation_average_metrics": state.best_metric,
        "best_validation_loss": state.best_loss,
        "checkpoint_metric": "average_metrics" if others else first,
        "checkpoints_validated": state.validations,
        "validation_examples": len(data.validation),
        "validation_origin": data.origins["validation"],
    }


def named_scores(scored: Evaluation, gates: GateNames, *, split: str) -> dict[str, Any]:
    """An evaluation under the published names, which begin with the split's.

    What is not said to be by likelihood is by generation, as published. `moe_weight_k` is a source's gate, averaged
    over examples and the sites that have it.
    """
    likely = scored.by_likelihood or {}
    gates_LK = scored.gates_LK
    weights_K = [] if gates_LK is None else gates.over_sites(gates_LK).tolist()
    scores = {
        **scored.metrics,
        **{f"{name}_by_likelihood": value for name, value in metrics_of(likely).items()},
        "loss": scored.loss,
        **{f"moe_weight_{k}": weight for k, weight in enumerate(weights_K)},
        "runtime": scored.runtime,
        "samples_per_second": scored.samples_per_second,
    }
    return {
        **{f"{split}_{name}": value for name, value in scores.items()},
        "sources": list(gates.sources),
        "gates": {} if gates_LK is None else gates.by_site(gates_LK),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a report as JSON (rank 0 calls).

    Raises:
        RunFolderError: it cannot be written.
    """
    _write(path, json.dumps(results, indent=2) + "\n")


def write_predictions(path: Path, setup: Setup, tested: Evaluation) -> None:
    """Write what was predicted of the test set, a line of JSON an example, in the set's order (rank 0 calls).

    A line has `input`, `target`, `references`, `prediction`, `scores` (what the example scores alone, 0 to 100; empty
    for a regression), `gates` (source -> weight, averaged over the sites that have it; empty without experts), and
    `group` where examples are scored together.

    Raises:
        RunFolderError: it cannot be written.
    """
    dataset, names, gates_NLK = setup.data.test, setup.built.gate_names, tested.gates_NLK
    gates = [[]] * len(dataset) if gates_NLK is None else names.over_sites(gates_NLK).tolist()
    lines = []
    for row, prediction, gates_K in zip(dataset, tested.predictions, gates, strict=True):
        references = list(row["references"])
        line = {
            "input": row["source"],
            "target": row["target"],
            "references": references,
            "prediction": prediction,
            "scores": example_scores(setup.task, prediction, references),
            "gates": {
                name: round(weight, 4) for name, weight in zip(names.sources, gates_K, strict=True)
            },
            **({"group": row["group"]} if row["group"] else {}),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    _write(path, "".join(lines))


def split_line(results: dict[str, Any]) -> str:
    """What was scored: `test: 28 examples, half of ...`."""
    return f"{results['split']}: {results['examples']} examples, {results['split_origin']}"


def checkpoint_line(results: dict[str, Any]) -> str:
    """Which checkpoint a run's report is about, and how it was chosen."""
    best, validated = results["best_checkpoint"], results["checkpoints_validated"]
    if results["best_validation_average_metrics"] is None:
        return f"{best}: the last one, since none was validated"
    return (
        f"{best}: the best of {'all' if validated is None else validated} validated, by {results['checkpoint_metric']} "
        f"on validation ({results['validation_examples']} examples, {results['validation_origin']}); a tie goes to "
        "the lower loss"
    )


def results_block(results: dict[str, Any], files: Mapping[str, Path]) -> str:
    """The final report as the published code prints it: names and aligned values, and whose weight a weight is.

    Below it what was scored, how the checkpoint was chosen, and where the files lie.

    Args:
        results: what `final_results`, or `pemt evaluate`, gives.
        files: paths by what lies there.
    """
    split = results["split"]
    sources = {f"{split}_moe_weight_{k}": name for k, name in enumerate(results["sources"])}
    prefix = f"{split}_"
    scores = {
        name.removeprefix(prefix): results[name] for name in results if name.startswith(prefix)
    }
    rows = {f"{prefix}{name}": value for name, value in without_redundant_mean(scores).items()}
    rows = {"epoch": results["epoch"], **rows} if "epoch" in results else rows
    texts = {
        name: f"{value:.4f}" if isinstance(value, float) else str(value)
        for name, value in rows.items()
    }
    name_width, value_width = max(map(len, texts)), max(map(len, texts.values()))
    lines = [
        f"  {name:<{name_width}} = {text:>{value_width}}{f'  {sources[name]}' if name in sources else ''}"
        for name, text in texts.items()
    ]
    notes = [split_line(results)]
    if "best_checkpoint" in results:
        notes.append(checkpoint_line(results))
    places = [f"{what}: {path}" for what, path in files.items()]
    return "\n".join([f"***** {split} metrics *****", *lines, *notes, *places])


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written: {error.strerror}") from None
