"""What a save costs a training: rounds of steps with one at their head, in turn with rounds without.

    accelerate launch --config_file launchers/accelerate/cpu.yaml --deepspeed_config_file ds_configs/zero2.json \
        -m tests.measure.save [--size t5-small] [--batch 8] [--source 128] [--rounds 10] [--steps 10]

Prints, of rank 0, medians and maxima: of a step without saves; of what the training waits while copies are
made; of the writing beside it; and of all that a save costs, which is a round with it less the round
before: in milliseconds, in steps, and as a share of the time of so many steps as a round has.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pemt.bench.step import StepBench, build_model
from pemt.checkpoint.checkpoint import Checkpoints
from pemt.checkpoint.train_state import TrainState
from pemt.config.schema import AdaptConfig
from pemt.engine import Engine, shut_down
from tests.measure.zero import optimizer_of, random_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="t5-small")
    shape = (("batch", 8), ("source", 128), ("target", 16))
    for name, default in (*shape, ("rounds", 10), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    rounds, steps = given.pop("rounds"), given.pop("steps")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(StepBench(**given), Path(folder), rounds=rounds, steps=steps)
        if figures:
            print(json.dumps(figures))
        shut_down()


def measure(
    bench: StepBench, folder: Path, *, rounds: int, steps: int
) -> dict[str, dict[str, float]]:
    """Trains and saves on all ranks; the figures on rank 0, nothing on others."""
    config = AdaptConfig(
        model_name_or_path="none",
        output_dir=str(folder),
        task_name="none",
        method="adapter",
        per_device_train_batch_size=bench.batch,
        bf16=False,
    )
    engine = Engine(config)
    model = build_model(bench, "fused")
    engine.prepare(model, optimizer_of(model))
    checkpoints = Checkpoints(folder, engine, config, {})
    batch = random_batch(bench)

    def seconds_of_a_round() -> float:
        torch.distributed.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            engine.backward(engine.model(**batch).loss, last=True)
            engine.step()
        return time.perf_counter() - began

    seconds_of_a_round()  # kernels, moments
    plain, blocked_seconds, saving, lines = [], [], [], []
    for number in range(1, rounds + 1):
        plain.append(seconds_of_a_round())
        began = time.perf_counter()
        checkpoints.save(TrainState(step=number))
        blocked_seconds.append(time.perf_counter() - began)
        saving.append(blocked_seconds[-1] + seconds_of_a_round())
        checkpoints.finish()
        lines += checkpoints.lines()
    if not engine.is_main:
        return {}
    found = [re.search(r"([\d.,]+) MB in ([\d.]+) s,", line) for line in lines]
    written = [(float(each[1].replace(",", "")), float(each[2])) for each in found if each]
    assert len(written) == rounds, lines
    step = statistics.median(plain) / steps
    cost = [with_it - without for with_it, without in zip(saving, plain, strict=True)]
    return {
        "size_mb": middle_and_most([size for size, _ in written]),
        "step_ms": middle_and_most([1e3 * each / steps for each in plain]),
        "waits_ms": middle_and_most([1e3 * each for each in blocked_seconds]),
        "writing_ms": middle_and_most([1e3 * each for _, each in written]),
        "cost_ms": middle_and_most([1e3 * each for each in cost]),
        "waits_in_steps": middle_and_most([each / step for each in blocked_seconds]),
        "cost_in_steps": middle_and_most([each / step for each in cost]),
        "share_of_steps": middle_and_most([each / (step * steps) for each in cost]),
    }


def middle_and_most(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 4), "max": round(max(values), 4)}


if __name__ == "__main__":
    main()
