"""`torch_compile`: the same training by compiled blocks."""

from __future__ import annotations

from functools import partial
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
from tests.support.tiny_t5 import target_model, tiny_batch

WAYS = [(False, False), (True, False), (True, True)]  # compiled, checkpointed
COMPILE = torch.compile
SOURCES = {"tiny-a": ["q", "v", "wo"], "tiny-b": ["wo"]}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_blocks_give_the_same_losses(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Batches of several widths; nothing of a block is left to Python, gates and sparsity loss included.

    The experts are on attention and on the FFNs. With activation checkpointing blocks run as written. Inductor, which
    a run takes, compiles for a minute what the same two graphs are made of.
    """
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))
    base, data = (
        make_base(tmp_path / "base", num_layers=1),
        write_task_files(tmp_path / "d", seed=0),
    )
    for task in (*SOURCES, "tiny-target"):
        tiny_task(task)
    few = {"max_steps": 3, "eval_strategy": "no", "max_eval_samples": 2}
    bank = tmp_path / "bank"
    for task, modules in SOURCES.items():
        expert = ExpertConfig(rank=4, target_modules=modules)
        run_source(source_config(base, data, tmp_path / task, bank, task, expert=expert, **few))
    few["mixture"] = MixtureConfig(prompt_dropout=0.0)
    found = []
    for compiled, checkpointed in WAYS:
        torch._dynamo.reset()
        counters.clear()
        folder = tmp_path / f"{compiled}-{checkpointed}"
        ways = {"torch_compile": compiled, "gradient_checkpointing": checkpointed}
        run_adapt(adapt_config(base, data, folder, bank, "tiny-target", **ways, **few))
        found.append(losses(folder))
        told = "torch_compile: has no effect on blocks that mix experts" in capsys.readouterr().out
        assert told == (compiled and checkpointed)
        assert checkpointed or (counters["stats"]["unique_graphs"] > 0) == compiled
        assert checkpointed or not counters["graph_break"]
    for each in found:
        assert each == pytest.approx(found[0], rel=1e-5)
    assert len(set(found[0].values())) == 3


@pytest.mark.slow
def test_every_block_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that mixes experts is a program of its own, and dynamo's limit is one for all of them (8; here 3)."""
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        model, batch = target_model(), tiny_batch()
        model.compile_blocks()
        model(**batch).loss.backward()
        with torch.no_grad():
            model.eval()(**batch)
    assert counters["stats"]["unique_graphs"] >= 2 * 5
