"""`pemt evaluate`: the scores of a finished run on any split of its task, or of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pemt.config import PemtError
from pemt.data import load_split
from pemt.engine import Engine
from pemt.monitor import quiet_libraries
from pemt.run.evaluate import evaluate
from pemt.run.finished import finished_config, load_on_all, prepare_finished
from pemt.run.results import results_block, scores_of, write_results
from pemt.tasks import SPLITS


def evaluate_run(
    run_dir: str | Path,
    *,
    split: str = "test",
    output_file: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a finished run on a split, print the scores and write them (all ranks call).

    Args:
        run_dir: the run's output folder; its best weights are scored.
        split: `train`, `validation` or `test`, as the run was given them.
        output_file: json; default: `<split>_results.json` in run_dir, after the task's name where it is not the run's.
        overrides: as for `finished_config`.

    Returns:
        What the file holds: `<split>_accuracy` … under the names of `all_results.json`.

    Raises:
        PemtError: the run, its data or the file cannot be used.
    """
    if split not in SPLITS:
        raise PemtError(f"split: found {split}, allowed are {', '.join(SPLITS)}")
    config = finished_config(run_dir, overrides)
    if config.streaming and split == "train":
        raise PemtError(
            "split: this run's training set is a stream, which has no end; give --streaming false"
        )
    engine = Engine(config)
    quiet_libraries(engine.is_main)
    finished = load_on_all(run_dir, config, engine)
    # Trained on an answer a time, scored once an example.
    task = replace(finished.task, train_on_every_answer=False)
    with engine.local_first(f"preparing the examples of {task.name}"):
        examples, notes, made = load_split(task, config, finished.tokenizer, split)
    prepare_finished(finished, engine)
    scored = evaluate(engine, examples, task=task, tokenizer=finished.tokenizer, config=config)
    results = {
        "run": str(finished.folder),
        "checkpoint": finished.checkpoint.name,
        "task_name": config.task_name,
        "split": split,
        "examples": len(scored.predictions),
        "split_origin": made,
        **scores_of(scored, finished.gate_names, split=split),
    }

    def write() -> None:
        own = finished_config(run_dir).task_name == config.task_name
        name = f"{split}_results.json" if own else f"{config.task_name}_{split}_results.json"
        path = Path(output_file or finished.folder / name)
        for note in notes:
            print(note)
        files = {"results": path, "checkpoint": finished.checkpoint}
        print(results_block(results, files), flush=True)
        write_results(path, results)

    engine.on_rank0(write, "writing results")
    engine.release()
    return results
