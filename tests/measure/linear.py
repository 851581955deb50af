"""`python -m tests.measure.linear`: one product of a few rows, by three ways and beside reading the weights alone.

As while answering, no weight is in a cache: each call takes the next of matrices of 400 MB together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pemt.ops.select import compiled

SHAPES = [(512, 512), (512, 2048), (2048, 512), (512, 32128), (768, 768), (768, 3072), (1024, 4096)]


@torch.inference_mode()
def milliseconds(rows: int, inputs: int, outputs: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, each way in turn."""
    few_rows = compiled("cpu").few_rows
    assert few_rows is not None
    weights = torch.randn(max(3, 400_000_000 // (4 * inputs * outputs)), outputs, inputs)
    x = torch.randn(rows, inputs)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "F.linear": lambda weight: F.linear(x, weight),
        "oneDNN": lambda weight: torch.ops.mkldnn._linear_pointwise(
            x, weight, None, "none", [], None
        ),
        "few_rows": lambda weight: few_rows(x, weight),
        "reading": lambda weight: weight.sum(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    at = 0
    for _ in range(rounds):
        for name, way in ways.items():
            at = (at + 1) % len(weights)
            began = time.perf_counter()
            way(weights[at])
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    """Print a table: one line for every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for rows in given.rows:
        for inputs, outputs in SHAPES:
            found = milliseconds(rows, inputs, outputs, given.rounds)
            told = "  ".join(f"{name} {value:7.3f}" for name, value in found.items())
            print(f"{rows:3} x {inputs} -> {outputs:5}, ms: {told}", flush=True)


if __name__ == "__main__":
    main()
