"""What does not go together is refused with one line that says what, and what would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from pemt.config import AdapterConfig, ExpertConfig, PemtError
from pemt.model import ModelError, PemtT5, description_prompt
from tests.support.tiny_t5 import ADAPTER, EXPERT, MIXTURE, tiny_base, tiny_prompt, tiny_source


def _target(*sources: Any, **changes: Any) -> PemtT5:
    arguments = {
        "sources": sources,
        "mixture": MIXTURE,
        "adapter": ADAPTER,
        "prompt_PD": tiny_prompt(),
        **changes,
    }
    return PemtT5.target(tiny_base(), **arguments)


def _without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tiny_source().weights.items() if name != key}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            replace(tiny_source(), weights=_without("decoder.2.up")),
            "source `rte`: tensor `decoder.2.up` is missing",
        ),
        (
            replace(
                tiny_source(), weights={**tiny_source().weights, "encoder.9.up": torch.ones(1)}
            ),
            "`encoder.9.up` does not belong there",
        ),
        (replace(tiny_source(), rank=5), "`encoder.0.down` is [4, 48], this base model and rank 5"),
        (
            replace(tiny_source(), prompt_PD=torch.ones(3, 8)),
            "the prompt is [3, 8], this base model needs [tokens, 16]",
        ),
        (replace(tiny_source(), prompt_PD=torch.ones(0, 16)), "the prompt is [0, 16]"),
    ],
)
def test_a_source_that_does_not_fit(source: Any, expected: str) -> None:
    with pytest.raises(ModelError) as raised:
        _target(source)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, PemtError)


def test_experts_of_two_kinds() -> None:
    with pytest.raises(ModelError, match="`boolq` is bottleneck, `rte` is lora; choose experts"):
        _target(tiny_source(), tiny_source("boolq", "bottleneck"))


def test_reduction_factors_that_leave_nothing() -> None:
    with pytest.raises(ModelError, match=r"adapter.reduction_factor: found 17, .* 16"):
        _target(tiny_source(), adapter=AdapterConfig(reduction_factor=17))
    expert = ExpertConfig(kind="bottleneck", reduction_factor=49)
    with pytest.raises(ModelError, match=r"expert.reduction_factor: found 49, .* 48"):
        PemtT5.source(tiny_base(), expert=expert, prompt_PD=tiny_prompt())


def test_a_base_that_is_no_t5() -> None:
    config = BartConfig(
        vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1,
    )  # fmt: skip
    with pytest.raises(ModelError, match="found a BartForConditionalGeneration, allowed are T5"):
        PemtT5.source(
            BartForConditionalGeneration(config), expert=EXPERT["lora"], prompt_PD=tiny_prompt()
        )


def test_a_base_that_does_not_say_what_its_decoder_starts_from() -> None:
    base = tiny_base()
    base.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        PemtT5.source(base, expert=EXPERT["lora"], prompt_PD=tiny_prompt())


def test_description_prompt() -> None:
    base = tiny_base()

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}

    prompt_PD = description_prompt(tokenizer, base, "does it follow")
    torch.testing.assert_close(prompt_PD, base.shared.weight[[4, 2, 6]].detach())
    assert not prompt_PD.requires_grad
    with pytest.raises(ModelError, match="description: found ' ', which has no tokens"):
        description_prompt(tokenizer, base, " ")
