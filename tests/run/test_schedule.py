"""A schedule that is set to its step is where as many calls of `step` would have taken it."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from pemt.run.prepare import set_schedule_step


def schedule(kind: str) -> LambdaLR:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    return get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=20)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("step", [0, 3, 4, 11, 20])
def test_a_schedule_is_set_to_its_step(kind: str, step: int) -> None:
    stepped, put = schedule(kind), schedule(kind)
    for _ in range(step):
        stepped.optimizer.step()
        stepped.step()
    put.optimizer.step()  # as a run that resumes has done
    set_schedule_step(put, step)
    for _ in range(3):
        assert put.get_last_lr() == stepped.get_last_lr()
        assert put.optimizer.param_groups[0]["lr"] == stepped.optimizer.param_groups[0]["lr"]
        for each in (stepped, put):
            each.optimizer.step()
            each.step()
