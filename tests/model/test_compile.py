"""`torch_compile`: the same training by compiled blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from pemt.config.schema import ExpertConfig, MixtureConfig
from pemt.run.train import run_adapt, run_source
from tests.support.tiny import (
    adapt_config,
    losses,
    make_base,
    source_config,
    tiny_task,
    write_task_files,
)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(tmp_path: Path) -> None:
    """Batches of several widths; nothing of a block is left to Python, gates and sparsity loss included."""
    base, data = (
        make_base(tmp_path / "base", num_layers=1),
        write_task_files(tmp_path / "d", seed=0),
    )
    for task in ("tiny-a", "tiny-target"):
        tiny_task(task)
    few = {"max_steps": 3, "eval_strategy": "no", "max_eval_samples": 2}
    bank = tmp_path / "bank"
    expert = ExpertConfig(rank=4)
    run_source(source_config(base, data, tmp_path / "s", bank, "tiny-a", expert=expert, **few))
    few["mixture"] = MixtureConfig(prompt_dropout=0.0)
    found = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        folder = tmp_path / str(compiled)
        run_adapt(
            adapt_config(base, data, folder, bank, "tiny-target", torch_compile=compiled, **few)
        )
        found[compiled] = losses(folder)
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        assert not counters["graph_break"]
    assert found[True] == pytest.approx(found[False], rel=1e-5)
    assert len(set(found[True].values())) == 3
