"""The digest that a checkpoint, an expert and an export know their base model by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pemt.config.schema import ExpertConfig
from pemt.model import BitFitT5, FullT5, PeftT5, PemtT5, base_digest, checked_base, peft_settings
from tests.support.tiny_t5 import FAMILIES, target_model, tiny_base, tiny_prompt

MATRICES = (".q.", ".k.", ".v.", ".o.", "relative_attention_bias", ".wi", ".wo.")
MATRICES += ("_proj.", "embed_tokens")


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_value_in_any_matrix_is_another_base(kind: str) -> None:
    base = checked_base(tiny_base(kind))
    whole, seen = base_digest(base), 0
    for name, weight in base.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.02)
        is_matrix = "norm" not in name
        assert (base_digest(base) != whole) == is_matrix, name
        assert not is_matrix or any(part in name for part in (*MATRICES, "shared", "lm_head")), name
        seen += is_matrix
        with torch.no_grad():
            weight.copy_(before)
    assert base_digest(base) == whole
    assert seen > 20


METHODS: dict[str, Callable[[PreTrainedModel], object]] = {
    "source": lambda base: PemtT5.source(
        base, expert=ExpertConfig(rank=2), prompt_PD=tiny_prompt()
    ),
    "pemt": lambda base: target_model(base=base),
    "full": FullT5,
    "bitfit": BitFitT5,
    "lora": lambda base: PeftT5(base, peft_settings("lora", {})),
    "ia3": lambda base: PeftT5(base, peft_settings("peft", {"peft_type": "IA3"})),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_put_into_a_base_does_not_change_it(method: str) -> None:
    base = tiny_base()
    before = base_digest(checked_base(base))
    METHODS[method](base)
    assert base_digest(checked_base(base)) == before
