"""A training of two steps, as small as it can be: `pemt doctor` launches it to see DeepSpeed run.

    accelerate launch ... -m pemt.engine.probe

Rank 0 prints `probe: <ranks> rank(s), ZeRO-<stage>, <device>` when the loss has fallen.
"""

from __future__ import annotations

import torch
from torch import nn

from pemt.config import RunConfig
from pemt.engine.engine import Engine
from pemt.engine.exit import run_and_exit
from pemt.engine.launcher import EngineError, shut_down


def main() -> None:
    """Train a linear layer behind a frozen one for two steps (all ranks call).

    Raises:
        EngineError: the steps were taken, but the loss did not fall.
    """
    config = RunConfig(
        model_name_or_path="none",
        output_dir="none",
        task_name="none",
        per_device_train_batch_size=1,
        bf16=False,
    )
    engine = Engine(config)
    engine.seed(0, per_rank=False)
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), layer)
    engine.prepare(model, torch.optim.AdamW(layer.parameters(), lr=1e-2))
    inputs = torch.ones(1, 8, device=engine.device)
    losses = []
    for _ in range(2):
        loss = engine.model(inputs).square().mean()
        engine.backward(loss, last=True)
        engine.step()
        losses.append(float(loss))
    if not losses[1] < losses[0]:
        raise EngineError(f"the probe's loss went from {losses[0]} to {losses[1]}")
    if engine.is_main:
        print(
            f"probe: {engine.world_size} rank(s), ZeRO-{engine.zero_stage}, {engine.device.type}",
            flush=True,
        )
    shut_down()


if __name__ == "__main__":
    run_and_exit(main)
