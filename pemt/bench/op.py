"""`pemt bench op`: one FFN's mixture, target adapter and sparsity loss, forward and backward.

N tokens, F d_ff, D d_model, K experts, R rank, T = K R, H the target adapter's inner width.

`pemt bench op --help` (commands/bench.py) tells what is compared, and how.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from operator import truediv
from typing import Any

import torch

from pemt.bench import layer

RATIOS = (("fused", "floor"), ("loop", "fused"), ("stacked", "fused"), ("packed", "fused"),
          ("loop", "floor"), ("fused", "frozen"))  # fmt: skip
VARIANTS = ("loop", "stacked", "packed", "fused", "floor", "frozen")


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what runs for the first time may not be captured
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_once(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round; each round begins with another one, so that none always follows the same other."""
    for number in range(rounds):
        turn = number % len(names)
        yield from (*names[turn:], *names[:turn])


def measure(bench: layer.OpBench) -> dict[str, Any]:
    """Times all variants in turn, `rounds` times: milliseconds, ratios and the floor's rate."""
    ffn = layer.Layer(bench)
    floor = layer.Floor(ffn)
    runs: dict[str, Callable[[], object]] = {
        "loop": partial(layer.step, ffn, layer.forward_loop),
        "stacked": partial(layer.step, ffn, layer.forward_stacked),
        "packed": partial(layer.step_ops, ffn, "packed"),
        "fused": partial(layer.step_ops, ffn, bench.device),
        "floor": floor,
        "frozen": partial(layer.step, ffn, layer.forward_frozen),
    }
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with torch.set_grad_enabled(not bench.forward_only):
        for run in runs.values():  # warm-up; the first one builds the kernels
            run()
            run()
        if bench.cuda_graph:
            runs = {name: captured(run) for name, run in runs.items()}
        for name in in_turn(VARIANTS, bench.rounds):
            times[name].append(time_once(runs[name], bench.device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        f"{over}/{under}": statistics.median(map(truediv, times[over], times[under]))
        for over, under in RATIOS
    }
    return {
        **asdict(bench),
        "threads": torch.get_num_threads(),
        "milliseconds": medians,
        "ratios": ratios,
        "floor_tflops": floor.flops / medians["floor"] / 1e9,
        "floor_products": dict(floor.libraries),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = (
        f"{result['shape']}: {result['batch']} x {result['tokens']} tokens, {result['dtype']} on"
        f" {result['device']} ({result['threads']} threads), medians of {result['rounds']} rounds"
        f"{' of CUDA graphs' if result['cuda_graph'] else ''}"
    )
    rows = [f"  {name:<8} {value:10.3f} ms" for name, value in result["milliseconds"].items()]
    rows += [f"  {name:<15} {value:8.3f}" for name, value in result["ratios"].items()]
    products = result["floor_products"].items()
    by_library = ", ".join(f"{count} by {library}" for library, count in products)
    return "\n".join(
        [head, *rows, f"  floor at {result['floor_tflops']:.3f} TFLOP/s: products {by_library}"]
    )
