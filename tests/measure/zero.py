"""A step under ZeRO-0, 1 and 2 beside plain DDP: same model, same ranks, interleaved in one launch.

    accelerate launch --config_file launchers/accelerate/cpu.yaml --deepspeed_config_file ds_configs/zero2.json \
        -m tests.measure.zero [--size t5-small] [--batch 8] [--source 128] [--rounds 15]

Prints, per variant, the median milliseconds of a step, and how these stand to DDP's step of the same round: the
median ratio, and the median difference in milliseconds, which a host that is busy elsewhere adds to as well.
DDP is made as accelerate makes it without DeepSpeed. The files are those of ds_configs/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pemt.bench.step import StepBench, build_model
from pemt.config.schema import AdaptConfig
from pemt.engine import Engine, shut_down
from pemt.engine.placement import skip_frozen_broadcast
from pemt.model import PemtT5
from tests.conftest import ROOT

STAGES = ("zero0", "zero1", "zero2")
Step = Callable[[dict[str, Tensor]], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="t5-small")
    for name, default in (("batch", 8), ("source", 128), ("target", 16), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args())
    rounds = given.pop("rounds")
    bench = StepBench(**given)
    steps = {name: deepspeed_step(name, bench) for name in STAGES}
    steps["ddp"] = ddp_step(build_model(bench, "fused").eval())
    milliseconds: dict[str, list[float]] = {name: [] for name in steps}
    batch = random_batch(bench)
    first = {name: step(batch) for name, step in steps.items()}
    assert max(first.values()) - min(first.values()) < 1e-4 * first["ddp"], first
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            torch.distributed.barrier()
            started = time.perf_counter()
            steps[name](batch)
            milliseconds[name].append(1e3 * (time.perf_counter() - started))
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(figures(milliseconds)))
    shut_down()


def figures(milliseconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rounds = {
        name: list(zip(each, milliseconds["ddp"], strict=True))
        for name, each in milliseconds.items()
    }
    return {
        name: {
            "median_ms": round(statistics.median(milliseconds[name]), 2),
            "to_ddp": round(statistics.median(ours / ddp for ours, ddp in pairs), 4),
            "minus_ddp_ms": round(statistics.median(ours - ddp for ours, ddp in pairs), 2),
        }
        for name, pairs in rounds.items()
    }


def deepspeed_step(name: str, bench: StepBench) -> Step:
    """A step as the training loop takes it."""
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / "ds_configs" / f"{name}.json")
    config = AdaptConfig(
        model_name_or_path="none",
        output_dir="none",
        task_name="none",
        method="adapter",
        per_device_train_batch_size=bench.batch,
        bf16=False,
    )
    engine = Engine(config)
    model = build_model(bench, "fused").eval()  # no dropout: all variants have one loss
    engine.prepare(model, optimizer_of(model))

    def step(batch: dict[str, Tensor]) -> float:
        loss = engine.model(**batch).loss
        engine.backward(loss, last=True)
        engine.step()
        return float(loss.detach())

    return step


def ddp_step(model: PemtT5) -> Step:
    optimizer = optimizer_of(model)
    with skip_frozen_broadcast(model):
        wrapped = DistributedDataParallel(model)
    trained = [parameter for _, parameter in model.trainable_parameters()]

    def step(batch: dict[str, Tensor]) -> float:
        loss = wrapped(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def optimizer_of(model: PemtT5) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for _, each in model.trainable_parameters()], lr=1e-4)


def random_batch(bench: StepBench) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return {
        "input_ids": torch.randint(2, 32_000, (bench.batch, bench.source), generator=draw),
        "attention_mask": torch.ones(bench.batch, bench.source).long(),
        "labels": torch.randint(2, 32_000, (bench.batch, bench.target), generator=draw),
    }


if __name__ == "__main__":
    main()
