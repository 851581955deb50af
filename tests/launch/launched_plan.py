"""What every launched rank runs for the planner's tests: trainings of a few steps, weighed from the inside.

    accelerate launch ... -m tests.launch.launched_plan WORLD FOLDER TRAINING...

WORLD holds a base model, a bank and a task. The report goes to FOLDER, of every rank and for each TRAINING (`fp32`,
`bf16`, and last `large`, one of a model that dwarfs the interpreter): the bytes that have left and reached the
network interface PEMT_INTERFACE at the start, and so far after each step; the bytes of gradients before a
step and of the optimizer's states after it; and of the large one the peak of memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import T5ForConditionalGeneration

from pemt.bank.entries import write_entry
from pemt.bench.model import random_sources, random_t5
from pemt.config.schema import AdapterConfig, MixtureConfig, RunConfig
from pemt.engine import Engine, shut_down
from pemt.engine.exit import run_and_exit
from pemt.engine.process import peak, watch_peak
from pemt.model import ExpertSource, PemtT5, Site, base_shape
from pemt.plan import Job
from pemt.plan.shapes import Shape
from pemt.run.prepare import prepare
from pemt.run.train import run_adapt
from tests.support.tiny import adapt_config, make_base, tiny_task, write_task_files

TARGET = "tiny-target"
SOURCES = ("tiny-a", "tiny-b")
SIZES: dict[str, Any] = {"d_ff": 512, "d_kv": 64, "num_heads": 4, "num_layers": 2, "d_model": 256}
RANK, PROMPT = 8, 5
# The target adapter as wide as the model, so that gradients are no trifle on the wire.
ADAPTER = AdapterConfig(reduction_factor=1)
BATCH = 4
STEPS = 8
SMALL = Job(
    shape=Shape(vocab_size=32, num_decoder_layers=2, gated=False, tied=True, dropout=0.0, **SIZES),
    ranks=(RANK,) * len(SOURCES),
    prompt_tokens=5,
    source_prompt_tokens=PROMPT * len(SOURCES),
    adapter_reduction=ADAPTER.reduction_factor,
    batch=BATCH,
    bytes_per_value=4,
)
JOBS = {"fp32": SMALL, "bf16": replace(SMALL, bytes_per_value=2)}
# What a GPU computes in: nothing else is planned for one.
LARGE_VALUE = 2 if torch.cuda.is_available() else 4
LARGE = Job(
    shape=Shape(
        vocab_size=8000,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=8,
        gated=False,
        tied=True,
    ),
    ranks=(16,) * 3,
    prompt_tokens=8,
    source_prompt_tokens=24,
    batch=8,
    source=120,
    target=16,
    bytes_per_value=LARGE_VALUE,
)


def make_world(folder: Path) -> Path:
    """Base model, bank and task."""
    make_base(folder / "base", **SIZES)
    write_task_files(folder / TARGET, seed=2, rows=STEPS * 2 * BATCH)
    base = T5ForConditionalGeneration.from_pretrained(folder / "base")
    shape = base_shape(base.config)
    torch.manual_seed(0)
    for source in sources_of(SMALL, shape, names=SOURCES):
        entry = {"name": str(folder / "base"), **shape}
        write_entry(folder / "bank", source, base=entry, description=None, metrics={})
    return folder


def sources_of(
    job: Job, shape: dict[str, Any], names: Sequence[str] | None = None
) -> list[ExpertSource]:
    """Random experts such as a job plans with, for a base model of this `base_shape`."""
    prompt = job.source_prompt_tokens // len(job.ranks)
    sites = [[Site.from_name(name, shape) for name in each] for each in job.ranks_by_site] or None
    sources = random_sources(shape, ranks=job.ranks, prompt_tokens=prompt, sites=sites)
    names = names or [each.name for each in sources]
    return [replace(each, name=name) for each, name in zip(sources, names, strict=True)]


def main(world: Path, folder: Path, names: list[str]) -> None:
    weighed = Weighed()
    tiny_task(TARGET)
    weighed.watch()
    for name in names:
        if name == "large":  # after the small ones, which have loaded all libraries
            weighed.begin("large")
            weighed.report["large"]["peak"] = weigh_large()
            continue
        config = adapt_config(
            world / "base",
            world / TARGET,
            folder / name,
            world / "bank",
            TARGET,
            adapter=ADAPTER,
            mixture=MixtureConfig(prompt_dropout=0.0),
            eval_strategy="no",
            per_device_train_batch_size=BATCH,
            bf16=JOBS[name].bytes_per_value == 2,
        )
        weighed.begin(name)
        run_adapt(config)
    rank = int(os.environ["RANK"])
    (folder / f"rank{rank}.json").write_text(json.dumps(weighed.report))
    shut_down()


class Weighed:
    """Looks into every step of every engine from now on; `report` has a part for each training."""

    def __init__(self) -> None:
        self.report: dict[str, dict[str, Any]] = {}

    def begin(self, name: str) -> None:
        self.now: dict[str, Any] = {"wire": [], "gradients": [], "optimizer": []}
        self.report[name] = self.now

    def watch(self) -> None:
        step, prepare_model = Engine.step, Engine.prepare

        def watched(engine: Engine) -> float:
            self.now["gradients"].append(gradient_bytes(engine))
            norm = step(engine)
            self.now["optimizer"].append(optimizer_bytes(engine))
            dist.barrier()
            self.now["wire"].append(interface_bytes())
            return norm

        def started(engine: Engine, *arguments: Any, **options: Any) -> None:
            dist.barrier()
            before = interface_bytes()
            prepare_model(engine, *arguments, **options)
            dist.barrier()
            self.now["start"] = [interface_bytes()[way] - before[way] for way in (0, 1)]

        Engine.step = watched  # type: ignore[method-assign]
        Engine.prepare = started  # type: ignore[method-assign]


def interface_bytes() -> tuple[int, int]:
    """Sent and received so far."""
    name = os.environ.get("PEMT_INTERFACE")
    if name is None:
        return 0, 0
    (line,) = re.findall(rf"^ *{name}:(.*)$", Path("/proc/self/net/dev").read_text(), re.MULTILINE)
    counters = [int(word) for word in line.split()]
    return counters[8], counters[0]


def gradient_bytes(engine: Engine) -> int:
    optimizer: Any = getattr(engine.model, "optimizer", None)
    if engine.zero_stage == 3:
        return storage_bytes([optimizer.grad_partitions_flat_buffer])
    if engine.zero_stage in (1, 2):
        kept = optimizer.averaged_gradients.values()
        return storage_bytes([tensor for group in kept for tensor in group])
    return storage_bytes(
        [p.grad for _, p in engine.optimizer_state.parameters if p.grad is not None]
    )


def optimizer_bytes(engine: Engine) -> int:
    """Masters, moments and step counts; without the model's own weights, where they are the masters."""
    state = engine.base_optimizer.state
    tensors = [value for each in state.values() for value in each.values()]
    own = {parameter.data_ptr() for parameter in engine.module.parameters()}
    return storage_bytes([*tensors, *(p for p in state if p.data_ptr() not in own)])


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def weigh_large() -> int:
    """The peak of the third step's memory above what this rank had before the model.

    On a CPU its resident memory, on a GPU what PyTorch has allocated.
    """
    job = LARGE
    config = RunConfig(
        model_name_or_path="none",
        output_dir="none",
        task_name="none",
        per_device_train_batch_size=job.batch,
        bf16=job.bytes_per_value == 2,
    )
    engine = Engine(config)
    batch = {
        "input_ids": torch.randint(2, 100, (job.batch, job.source)),
        "attention_mask": torch.ones(job.batch, job.source).long(),
        "labels": torch.randint(2, 100, (job.batch, job.target)),
    }
    batch = {key: value.to(engine.device) for key, value in batch.items()}
    before = watch_peak(engine.device)
    prepare(config, engine, large_model(), None, total_steps=9)
    for _ in range(3):
        watch_peak(engine.device)
        engine.backward(engine.model(**batch).loss, last=True)
        engine.step()
    return peak(engine.device) - before


def large_model() -> PemtT5:
    torch.manual_seed(0)
    base = random_t5(LARGE.shape)
    return PemtT5.target(
        base,
        sources=sources_of(LARGE, base_shape(base.config)),
        mixture=MixtureConfig(),
        adapter=AdapterConfig(reduction_factor=LARGE.adapter_reduction),
        prompt_PD=torch.randn(LARGE.prompt_tokens, LARGE.shape.d_model),
    ).train()


if __name__ == "__main__":
    run_and_exit(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
