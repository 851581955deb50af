"""Batches at the edge, through every method's model: finite losses, finite gradients, defined values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pemt.model import BitFitT5, FullT5, PeftT5, TrainedT5, peft_settings
from tests.support.tiny_t5 import (
    MIXTURE,
    target_model,
    tiny_base,
    tiny_batch,
    tiny_prompt,
    tiny_sources,
)

MODELS: dict[str, Callable[[], TrainedT5]] = {
    "pemt": target_model,
    "pemt over real tokens": lambda: target_model(
        mixture=replace(MIXTURE, sparsity_over_padding=False)
    ),
    "pemt of bottlenecks": lambda: target_model(tiny_sources("bottleneck")),
    "adapter": lambda: target_model([]),
    "full": lambda: FullT5(tiny_base()),
    "full umt5": lambda: FullT5(tiny_base("umt5")),
    "bitfit": lambda: BitFitT5(tiny_base()),
    "lora": lambda: PeftT5(tiny_base(), peft_settings("lora", {})),
    "prompt": lambda: PeftT5(
        tiny_base(), peft_settings("prompt", {"num_virtual_tokens": 5}), prompt_PD=tiny_prompt()
    ),
}


def ignored(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Not one real token in the whole batch."""
    zeros = torch.zeros_like(batch["input_ids"])
    return {**batch, "input_ids": zeros, "attention_mask": zeros}


def row_of_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    return {**batch, "attention_mask": mask}


BATCHES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "labels all -100": lambda: ignored(tiny_batch()),
    "only padding": lambda: padding(tiny_batch()),
    "one row of padding": lambda: row_of_padding(tiny_batch()),
    "padding and no labels": lambda: ignored(padding(tiny_batch())),
    "one example": lambda: {key: value[:1] for key, value in tiny_batch().items()},
    "one token": lambda: {key: value[:1, :1] for key, value in tiny_batch().items()},
    "much padding": lambda: tiny_batch(extra_padding=100),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", BATCHES)
def test_finite(name: str, kind: str) -> None:
    model, batch = MODELS[name]().train(), BATCHES[kind]()
    out = model(**batch)
    assert out.loss is not None
    assert out.loss.isfinite()
    out.loss.backward()
    for parameter, value in model.trainable_parameters():
        assert value.grad is None or value.grad.isfinite().all(), parameter
    if (batch["labels"] == -100).all():
        assert out.ce_loss == 0, "nothing to predict costs nothing"
    with torch.no_grad():
        tokens = model.eval().generate(
            batch["input_ids"], batch["attention_mask"], max_new_tokens=3
        )
    assert len(tokens) == len(batch["input_ids"])
