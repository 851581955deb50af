"""`pemt demo`: the world, its base model, stage 1 on every source, stage 2 on every target and seed.

One launch runs everything: all ranks go through the same runs, one after another.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pemt.config import AdaptConfig, RunConfig, SourceConfig, parse_config
from pemt.demo.report import Row, write_report
from pemt.demo.tasks import SOURCES, TARGETS, register_tasks, write_task_files
from pemt.demo.tiny_t5 import cached_base
from pemt.demo.world import World
from pemt.engine import Engine
from pemt.run import run_adapt, run_source

METHODS = ("pemt", "adapter")


def run_demo(output_dir: Path, cache_dir: Path, *, quick: bool, world_seed: int) -> None:
    """Train everything and write the report (all ranks call).

    Args:
        output_dir, cache_dir, world_seed: as for `Demo`.
        quick: one target and one seed.
    """
    targets, seeds = (TARGETS[:1], [0]) if quick else (TARGETS, [0, 1, 2])
    demo = Demo(output_dir, cache_dir, world_seed)
    demo.prepare()
    for task in SOURCES:
        run_source(demo.source(task))
    rows = []
    for target in targets:
        for seed in seeds:
            for method in METHODS:
                results = run_adapt(demo.adapt(target, method, seed))
                rows.append(Row.of(method, target, seed, results))
    if demo.is_main:
        write_report(rows, output_dir)


class Demo:
    """Where the demo's files lie, and the configuration of each of its runs.

    Args:
        output_dir: receives the tasks' files, every run, the bank and the report.
        cache_dir: keeps the pre-trained base model for the next time.
        world_seed: makes another world of the same kind.
    """

    def __init__(self, output_dir: Path, cache_dir: Path, world_seed: int) -> None:
        self.output_dir, self.cache_dir, self.world_seed = output_dir, cache_dir, world_seed
        self.base = Path("made by prepare")
        self.is_main = True

    def prepare(self) -> None:
        """Files and base model, made by one rank while the others wait (all ranks call)."""
        register_tasks()
        engine = Engine(self.source(SOURCES[0]))
        self.is_main = engine.is_main
        with engine.local_main_first():
            self._make_files()
        engine.barrier()

    def _make_files(self) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        world = World.make(self.world_seed)
        data = self.output_dir / "data"
        if self.is_main:
            write_task_files(world, data, self.world_seed)
        paths = [data / task / "train.jsonl" for task in (*SOURCES, *TARGETS)]
        texts = [path.read_text(encoding="utf-8") for path in paths]
        self.base = cached_base(world, texts, self.cache_dir, seed=self.world_seed, say=print_now)

    def source(self, task: str) -> SourceConfig:
        """Stage 1 on one of the demo's source tasks."""
        return self._config(SourceConfig, "demo_source", task, f"source-{task}", seed=0)

    def adapt(self, task: str, method: str, seed: int) -> AdaptConfig:
        """Stage 2, or a baseline, on one of the demo's target tasks."""
        name = f"{task}-{method}-{seed}"
        return self._config(AdaptConfig, "demo_adapt", task, name, seed=seed, method=method)

    def _config(self, kind: Any, recipe: str, task: str, run: str, **fields: Any) -> Any:
        given: dict[str, Any] = {
            "model_name_or_path": self.base,
            "data_dir": self.output_dir / "data" / task,
            "output_dir": self.output_dir / run,
            "bank_dir": self.output_dir / "bank",
            "task_name": task,
            "overwrite_output_dir": "true",
            **fields,
        }
        flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        config: RunConfig = parse_config(kind, ["--config", recipe, *flags], prog="pemt demo")
        return config


def print_now(line: str) -> None:
    """Print a line at once, so that a slow step does not look like a halt."""
    print(line, flush=True)
