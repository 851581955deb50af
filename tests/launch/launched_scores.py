"""What every launched rank runs: scores and answers of a finished run, the end of a new one, and its data built once.

    accelerate launch ... -m tests.launch.launched_scores WORLD FOLDER SIZE...

WORLD holds a base model, a task's files and a finished run. Everything goes to FOLDER; a SIZE is that of a batch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from pemt.config.schema import MixtureConfig
from pemt.data import encoding, examples
from pemt.engine import shut_down
from pemt.engine.exit import run_and_exit
from pemt.run.evaluate_finished import evaluate_run
from pemt.run.predict import predict_file
from pemt.run.train import run_adapt
from tests.support.tiny import adapt_config, tiny_task

TASK = "tiny-scores"
MICRO_BATCHES = 6
STREAMED: dict[str, Any] = {
    "streaming": True,
    "eval_strategy": "no",
    "max_steps": 5,
    "shuffle_buffer_size": 24,
}


def main(world: Path, folder: Path, sizes: list[int]) -> None:
    tiny_task(TASK)
    calls = [count(examples, "example_of"), count(encoding, "encode_batch")]
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    measure(world, folder, sizes)
    built = {"examples": len(calls[0]), "encoded": len(calls[1])}
    (folder / f"built-{os.environ['RANK']}.json").write_text(json.dumps(built))
    shut_down()


def measure(world: Path, folder: Path, sizes: Sequence[int]) -> None:
    run = world / "run"
    for size in sizes:
        fields = ["--per_device_eval_batch_size", str(size)]
        evaluate_run(run, output_file=str(folder / f"scores-{size}.json"), overrides=fields)
        predict_file(
            run,
            input_file=str(world / TASK / "test.jsonl"),
            output_file=str(folder / f"answers-{size}.jsonl"),
            overrides=fields,
        )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    paths = (world / "base", world / TASK, folder / "run", folder / "no bank")
    config = adapt_config(
        *paths,
        TASK,
        method="adapter",
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES // ranks,
        mixture=MixtureConfig(prompt_dropout=0.0),  # ranks draw their own
    )
    run_adapt(config)
    run_adapt(replace(config, output_dir=str(folder / "streamed"), **STREAMED))


def count(module: Any, name: str) -> list[int]:
    """The calls of a function, counted from now on."""
    calls: list[int] = []
    original = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    setattr(module, name, counted)
    return calls


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), [*map(int, sys.argv[3:])]))
