"""The planner's formulas against a T5Gemma; tests/run/test_t5gemma_run.py has its parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pemt.plan.activations import saved
from pemt.plan.shapes import read_shape
from pemt.plan.speed import flops
from tests.plan.test_plan import batch_of, kept_for_backward, model_of, tiny_job
from tests.support.tiny_t5 import tiny_gemma


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["pemt", "adapter", "source", "full"])
def test_a_step_of_t5gemma(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms, gelu and attention are others than a T5's, and the decoder has sizes of its own."""
    base = tiny_gemma(hidden_size=12, intermediate_size=40, num_attention_heads=6, head_dim=6)
    base.save_pretrained(tmp_path)
    job = replace(tiny_job(method), shape=read_shape(str(tmp_path)), bytes_per_value=dtype.itemsize)
    job = replace(job, adapter_reduction=4)
    model = model_of(job, base).to(dtype)
    kept = kept_for_backward(model, lambda: model(**batch_of(job)))
    masks = job.batch * dtype.itemsize * (job.encoder_tokens**2 + 7 * 7 + 7 * job.encoder_tokens)
    assert saved(job, "cpu") - masks == pytest.approx(kept, rel=0.04)
    if method != "pemt":
        with FlopCounterMode(display=False) as counter:
            model(**batch_of(job)).loss.backward()
        assert flops(job) == pytest.approx(counter.get_total_flops(), rel=0.04)
