"""`pemt demo`: the world, its base model, stage 1 on every source, stage 2 on every target and seed.

One launch runs everything: all ranks go through the same runs, one after another.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

from pemt.config import AdaptConfig, SourceConfig, make_config
from pemt.demo.report import Row, write_report
from pemt.demo.tasks import SOURCES, TARGETS, register_tasks, write_task_files
from pemt.demo.tiny_t5 import cached_base
from pemt.demo.world import World
from pemt.engine import Engine
from pemt.monitor import progress_logger
from pemt.run import build_ops, run_adapt, run_source

# The rows of the table, by what they have beside the demo's stage 2.
ROWS: dict[str, dict[str, Any]] = {
    "pemt": {},
    "adapter": {"method": "adapter"},
    "uniform": {"mixture.gate": "uniform"},
}


def run_demo(output_dir: Path, cache_dir: Path, *, quick: bool, world_seed: int) -> None:
    """Train everything and write the report (all ranks call).

    Args:
        output_dir, cache_dir, world_seed: as for `Demo`.
        quick: one target and one seed.
    """
    targets, seeds = (TARGETS[:1], [0]) if quick else (TARGETS, [0, 1])
    demo = Demo(output_dir, cache_dir, world_seed)
    demo.say(
        "1 of 4: the fused op, the tasks' files and a tiny T5 that is pre-trained on the world's texts"
    )
    demo.prepare()
    sources = {}
    for number, task in enumerate(SOURCES, start=1):
        demo.say(f"2 of 4: stage 1, source `{task}`, {number} of {len(SOURCES)}")
        results = run_source(demo.source(task, overwrite_output_dir=True))
        sources[task] = results["test_accuracy"]
    rows = []
    runs = list(itertools.product(targets, seeds, ROWS))
    for number, (target, seed, row) in enumerate(runs, start=1):
        demo.say(f"3 of 4: stage 2, target `{target}`, {row}, seed {seed}, {number} of {len(runs)}")
        fields = {"seed": seed, "overwrite_output_dir": True, **ROWS[row]}
        config = demo.adapt(target, f"{target}-{row}-{seed}", **fields)
        rows.append(Row.of(row, target, seed, run_adapt(config)))
    demo.say("4 of 4: the report")
    demo.report(rows, sources)


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
        register_tasks()
        self.engine = Engine(self.source(SOURCES[0]))

    def say(self, line: str) -> None:
        """Announce a part of the demo, once for all ranks."""
        if self.engine.is_main:
            progress_logger().info(line)

    def prepare(self) -> None:
        """The op, the tasks' files and the base model (all ranks call)."""
        logging.getLogger("transformers").setLevel(logging.ERROR)
        build_ops(self.source(SOURCES[0]), self.engine)
        world = World.make(self.world_seed)
        data = self.output_dir / "data"
        self.engine.on_rank0(
            lambda: write_task_files(world, data, self.world_seed), "writing the tasks' files"
        )
        paths = [data / task / "train.jsonl" for task in (*SOURCES, *TARGETS)]
        texts = [path.read_text(encoding="utf-8") for path in paths]
        self.base = cached_base(
            world, texts, self.cache_dir, seed=self.world_seed, engine=self.engine
        )

    def report(self, rows: list[Row], sources: dict[str, float]) -> None:
        """Table, report.json and heat map of both stages (all ranks call)."""
        self.engine.on_rank0(
            lambda: write_report(rows, sources, self.output_dir), "writing the demo's report"
        )

    def source(self, task: str, **fields: Any) -> SourceConfig:
        """Stage 1 with these fields, on one of the demo's source tasks."""
        given = self._given(task, f"source-{task}", **fields)
        return make_config(SourceConfig, given, recipe="demo_source", prog="pemt demo")

    def adapt(self, task: str, folder: str, **fields: Any) -> AdaptConfig:
        """Stage 2 with these fields, on one of the demo's target tasks; `folder` is below `output_dir`."""
        given = self._given(task, folder, **fields)
        return make_config(AdaptConfig, given, recipe="demo_adapt", prog="pemt demo")

    def _given(self, task: str, folder: str, **fields: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(self.base),
            "data_dir": str(self.output_dir / "data" / task),
            "output_dir": str(self.output_dir / folder),
            "bank_dir": str(self.output_dir / "bank"),
            "task_name": task,
            **fields,
        }
