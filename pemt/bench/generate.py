"""`pemt bench generate`: answering with PEMT beside the base model's own `generate`.

`pemt bench generate --help` (commands/bench.py) tells what is compared, and how.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import truediv
from typing import Any

import torch
from torch import Tensor

from pemt.bench.op import in_turn
from pemt.bench.step import PROMPT_TOKENS, StepBench, build_model, plain_base

VARIANTS = ("plain", "longer", "pemt")


@dataclass(frozen=True, kw_only=True)
class GenerateBench:
    """What to measure.

    Args:
        size: a name in `pemt.plan.shapes.KNOWN`.
        batch: inputs in one pass; source, target: tokens of each input and answer.
        num_beams: 1 is greedy.
        device: cpu or cuda; dtype: a name in torch.
        rounds: how often every variant is timed.
        layers: of each stack, in place of the size's own; a few stand for all of a large model.
    """

    size: str = "t5-small"
    batch: int = 8
    source: int = 128
    target: int = 16
    num_beams: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 10
    layers: int | None = None


def variants_of(bench: GenerateBench) -> dict[str, Callable[[], Tensor]]:
    """The calls to time; each answers the whole batch."""
    step = StepBench(size=bench.size, layers=bench.layers, device=bench.device, dtype=bench.dtype)
    plain: Any = plain_base(step).eval()
    pemt = build_model(step, "fused").eval()
    torch.manual_seed(0)
    rows = (bench.batch, PROMPT_TOKENS + bench.source)
    longer_BS = torch.randint(2, 32_000, rows, device=bench.device)
    ids_BS = longer_BS[:, PROMPT_TOKENS:]
    given = {
        "num_beams": bench.num_beams,
        "max_new_tokens": bench.target,
        "min_new_tokens": bench.target,
        "do_sample": False,
    }
    return {
        "plain": lambda: plain.generate(ids_BS, attention_mask=torch.ones_like(ids_BS), **given),
        "longer": lambda: plain.generate(
            longer_BS, attention_mask=torch.ones_like(longer_BS), **given
        ),
        "pemt": lambda: pemt.generate(ids_BS, torch.ones_like(ids_BS), **given),
    }


def measure(bench: GenerateBench) -> dict[str, Any]:
    """Times all variants in turn."""
    calls = variants_of(bench)
    clock: dict[str, list[float]] = {name: [] for name in VARIANTS}
    computed: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for call in calls.values():  # warm-up; builds kernels
        call()
    for name in in_turn(VARIANTS, bench.rounds):
        began = time.perf_counter(), time.process_time()
        calls[name]()
        if bench.device != "cpu":
            torch.cuda.synchronize()
        clock[name].append(time.perf_counter() - began[0])
        computed[name].append(time.process_time() - began[1])
    return {
        **asdict(bench),
        "threads": torch.get_num_threads(),
        "milliseconds": {name: 1e3 * statistics.median(clock[name]) for name in VARIANTS},
        "pemt_over": {
            other: {
                "clock": statistics.median(map(truediv, clock["pemt"], clock[other])),
                "computed": statistics.median(map(truediv, computed["pemt"], computed[other])),
            }
            for other in ("plain", "longer")
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['size']}: {result['batch']} x ({PROMPT_TOKENS} + {result['source']} -> {result['target']}) tokens,"
        f" {result['num_beams']} beams, {result['dtype']} on {result['device']} ({result['threads']} threads),"
        f" medians of {result['rounds']} rounds",
        *(f"  {name:<8}{result['milliseconds'][name]:10.1f} ms" for name in VARIANTS),
    ]
    for other, ratio in result["pemt_over"].items():
        lines.append(
            f"  pemt / {other:<8} {ratio['clock']:.3f} on the clock, {ratio['computed']:.3f} computed"
        )
    return "\n".join(lines)
