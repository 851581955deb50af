"""What the mixture costs the host: a training step of a T5 so narrow that its arithmetic is nearly nothing.

    python -m tests.measure.host --rounds 100

On a GPU that is not busy with large batches this, and not the kernels, is what a step waits for.
oneDNN is off: what it takes to set a product up is a CPU's alone. AdamW takes all parameters at once, as PyTorch's does
on a GPU and DeepSpeed's, which has them in one buffer, everywhere.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace

import torch

from pemt.bench import step as bench_step
from pemt.bench.step import VARIANTS, Step, StepBench
from pemt.plan.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class NarrowStep(StepBench):
    batch: int = 2
    source: int = 8
    target: int = 4
    rank: int = 4

    @property
    def shape(self) -> Shape:
        """As deep as the size, and 64 wide."""
        return replace(super().shape, d_model=64, d_ff=64, d_kv=16, num_heads=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    bench_step.PROMPT_TOKENS = 4
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    bench = NarrowStep()
    steps = {variant: Step(bench, variant) for variant in VARIANTS}
    for step in steps.values():
        step.optimizer = torch.optim.AdamW(step.masters, foreach=True)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(options.rounds + 3):
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= 3:
                times[variant].append(time.perf_counter() - started)
    ffns = bench.shape.num_layers + bench.shape.num_decoder_layers
    for variant, values in times.items():
        pairs = list(zip(values, times["adapter"], strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        each = 1e6 * statistics.median(a - b for a, b in pairs) / ffns
        print(
            f"{variant:8} {1e3 * statistics.median(values):7.1f} ms  {ratio:6.3f} of adapter  {each:6.0f} us a mixture"
        )


if __name__ == "__main__":
    main()
