"""Stage 1 of small tasks, with which tests of stage 2 begin."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pemt.config import ExpertConfig
from pemt.run.train import run_source
from tests.support.tiny import make_base, source_config, tiny_task, write_task_files


def train_sources(folder: Path, sources: Iterable[str], target: str, **fields: Any) -> Path:
    """A base and each task's files in folders of their names, a bank of the sources; their runs are `run-SOURCE`.

    Args:
        sources: names; or what each one's expert is on, by name.
    """
    if not (folder / "base").is_dir():
        make_base(folder / "base")
    modules = sources if isinstance(sources, dict) else {name: ["wo"] for name in sources}
    for seed, task in enumerate((*modules, target)):
        tiny_task(task)
        write_task_files(folder / task, seed=seed)
    for task, on in modules.items():
        paths = (folder / "base", folder / task, folder / f"run-{task}", folder / "bank")
        expert = ExpertConfig(rank=2, target_modules=on)
        run_source(source_config(*paths, task, expert=expert, **fields))
    return folder
