"""`pemt evaluate`: the scores of a finished run on any split of its task, or of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.config import PemtError, RunConfig, spell_fields
from pemt.data import MemoryData, Rows, load_split
from pemt.engine import Engine
from pemt.monitor import quiet_libraries
from pemt.run.evaluate import Evaluation, evaluate
from pemt.run.finished import LoadedRun, finished_config, load_on_all, prepare_finished
from pemt.run.results import named_scores, results_block, write_results
from pemt.tasks import SPLITS, Metric, Task, check_metrics


def evaluate_run(
    run_dir: str | Path,
    *,
    split: str = "test",
    output_file: str | None = None,
    rows: Rows | None = None,
    metrics: Mapping[str, Metric] | None = None,
    constrain_labels: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a finished run on a split, print the scores and write them (all ranks call).

    Args:
        run_dir: the run's output folder; its best weights are scored.
        split: `train`, `validation` or `test`, as the run was given them.
        output_file: json; default: `<split>_results.json` in run_dir, after the task's name where it is not the run's.
        rows, metrics: the split itself, in memory, and a caller's own metrics, as `run_adapt` takes them.
        constrain_labels: score the most likely label, too, where answers are labels: `<split>_accuracy_by_likelihood`
            beside `<split>_accuracy`, which is by generation, as published.
        overrides: as for `finished_config`.

    Returns:
        What the file holds: `<split>_accuracy` … under the names of `all_results.json`.

    Raises:
        PemtError: the run, its data or the file cannot be used.
    """
    config = finished_config(run_dir, overrides)
    data = _given_rows(config, run_dir, split, rows)
    engine = Engine(config)
    quiet_libraries(engine.is_main)
    finished = load_on_all(run_dir, config, engine)
    task = _scored_task(finished, metrics or {}, constrain_labels=constrain_labels)
    with engine.local_first(f"preparing the examples of {task.name}"):
        examples, notes, made = load_split(task, config, finished.tokenizer, split, data)
    prepare_finished(finished, engine)
    scored = evaluate(
        engine,
        examples,
        task=task,
        tokenizer=finished.tokenizer,
        metrics=metrics,
        by_likelihood=constrain_labels,
    )
    results = _results(finished, scored, split=split, origin=made)
    engine.on_rank0(lambda: _write(finished, results, notes, output_file), "writing results")
    engine.release()
    return results


def _scored_task(
    finished: LoadedRun, metrics: Mapping[str, Metric], *, constrain_labels: bool
) -> Task:
    # Trained on an answer a time, scored once an example.
    task = replace(finished.task, train_on_every_answer=False)
    check_metrics(task, metrics)
    if constrain_labels and not task.labels:
        raise PemtError(f"constrain_labels: task {task.name} has no labels; leave it out")
    return task


def _results(finished: LoadedRun, scored: Evaluation, *, split: str, origin: str) -> dict[str, Any]:
    return {
        "run": str(finished.folder),
        "checkpoint": finished.checkpoint.name,
        "task_name": finished.config.task_name,
        "split": split,
        "examples": len(scored.predictions),
        "split_origin": origin,
        **named_scores(scored, finished.gate_names, split=split),
    }


def _given_rows(
    config: RunConfig, run_dir: str | Path, split: str, rows: Rows | None
) -> MemoryData | None:
    if split not in SPLITS:
        raise PemtError(f"split: found {split}, allowed are {', '.join(SPLITS)}")
    if config.streaming and split == "train":
        raise PemtError(
            "split: this run's training set is a stream, which has no end; give --streaming false"
        )
    if rows is not None:
        return MemoryData(splits={split: rows})
    if config.data_fingerprint is not None and config.data_dir is None:
        raise PemtError(
            f"{run_dir}: was trained on rows in memory; give --data_dir, or in Python `evaluate_run(..., rows=...)`"
        )
    return None


def _write(
    finished: LoadedRun, results: dict[str, Any], notes: Sequence[str], output_file: str | None
) -> None:
    name = f"{results['split']}_results.json"
    if finished_config(finished.folder).task_name != finished.config.task_name:
        name = f"{finished.config.task_name}_{name}"
    path = Path(output_file or finished.folder / name)
    for note in notes:
        print(spell_fields(note))
    print(results_block(results, {"results": path, "checkpoint": finished.checkpoint}), flush=True)
    write_results(path, results)
