"""While it answers, the base model has faster layers and beams: same answers, and nothing of it stays."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from pemt.model import decoding
from pemt.model.baselines import FullT5
from pemt.model.decoding import fast_generate
from tests.support.tiny_t5 import (
    ffn_sites,
    on_sites,
    source_model,
    target_model,
    tiny_base,
    tiny_inputs,
    tiny_sources,
)

# No token twice: random models repeat one for ever, whatever is wrong with them.
LONG = {"max_new_tokens": 8, "min_new_tokens": 8, "no_repeat_ngram_size": 1}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every product, by where the weight lies."""
    asked: list[int] = []
    product = decoding.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        asked.append(weight.data_ptr())
        return product(x, weight, bias)

    for place in ("model.decoding", "model.mixture", "ops.linear", "model.experts"):
        monkeypatch.setattr(f"pemt.{place}.linear", counted)
    return asked


def test_layers_are_afterwards_as_they_were(calls: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    with torch.no_grad(), fast_generate(model):
        hidden = model[0](x)
        assert model[1](hidden) is hidden
        model(x)
    assert len(calls) == 3
    with pytest.raises(KeyboardInterrupt), fast_generate(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())
    assert not hasattr(model, "_reorder_cache")
    assert [model[1].inplace, model[3].inplace] == [False, True]
    calls.clear()
    model(x).sum().backward()
    assert calls == []


def test_what_is_compiled_is_left_alone() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    model[0].compile()
    with fast_generate(model):
        assert not any("forward" in vars(module) for module in model.modules())
        assert not model[1].inplace


def test_a_layer_with_a_forward_of_its_own_keeps_it(calls: list[int]) -> None:
    layer = nn.Linear(4, 2)
    own = layer.forward
    layer.forward = own  # type: ignore[method-assign]
    with torch.no_grad(), fast_generate(nn.Sequential(layer)):
        layer(torch.randn(3, 4))
    assert vars(layer)["forward"] is own
    assert calls == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: target_model(tiny_sources("lora")),
        lambda: target_model(tiny_sources("bottleneck")),
        lambda: on_sites(tiny_base()),
        lambda: target_model([]),
        lambda: source_model("lora"),
        lambda: source_model("bottleneck"),
        lambda: FullT5(tiny_base()),
    ],
    ids=["lora", "bottleneck", "sites", "adapter", "source lora", "source bottleneck", "full"],
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_answers_are_the_same(make: Any, num_beams: int, calls: list[int]) -> None:
    model = make()
    fixed = {**LONG, "num_beams": num_beams}
    tokens, gates = model.generate_with_gates(**tiny_inputs(), **fixed)
    weights = [each.weight for each in model.modules() if type(each) is nn.Linear]
    # the encoder's are the op's where LoRA experts are mixed
    weights += [site.module.weight for site in ffn_sites(model.base) if site.spec.in_decoder]
    assert {each.data_ptr() for each in weights} <= set(calls)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pemt.model.trained_t5.fast_generate", lambda base: nullcontext())
        for place in ("mixture", "experts"):
            patched.setattr(f"pemt.model.{place}.linear", nn.functional.linear)
        patched.setattr("pemt.ops.linear.linear", nn.functional.linear)
        calls.clear()
        expected = model.generate_with_gates(**tiny_inputs(), **fixed)
    assert calls == []
    assert torch.equal(tokens, expected[0])
    assert (gates is None) == (expected[1] is None)
    if gates is not None:
        torch.testing.assert_close(gates, expected[1])


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_answers_under_autocast(kind: str) -> None:
    """As with fp16 and no DeepSpeed, where what is frozen stays in fp32."""
    model = target_model(tiny_sources(kind))
    with torch.autocast("cpu", torch.bfloat16):
        tokens, gates = model.generate_with_gates(**tiny_inputs(), **LONG)
    assert tokens.shape == (3, 9)
    assert gates is not None
    torch.testing.assert_close(
        gates, model.generate_with_gates(**tiny_inputs(), **LONG)[1], rtol=0.05, atol=0.05
    )


def states_of(cache: Any) -> list[Tensor]:
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


def test_the_encoders_keys_stay_where_they_are_while_beams_change_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may: those of a sample's beams are equal, and beams keep to their sample."""
    reorder = decoding._reorder_own
    seen: list[bool] = []

    def watched(cache: Any, beams: Any) -> Any:
        before, own = states_of(cache.cross_attention_cache), states_of(cache.self_attention_cache)
        assert reorder(cache, beams) is cache
        after = states_of(cache.cross_attention_cache)
        assert [id(states) for states in before] == [id(states) for states in after]
        for states in before:
            torch.testing.assert_close(states[beams], states)
        moved = zip(own, states_of(cache.self_attention_cache), strict=True)
        assert all(torch.equal(old[beams], new) for old, new in moved)
        seen.append(beams.tolist() != list(range(len(beams))))
        return cache

    monkeypatch.setattr(decoding, "_reorder_own", watched)
    model = target_model(tiny_sources("lora"))
    model.generate(**tiny_inputs(), **LONG, num_beams=4)
    assert any(seen), "no beam changed places"


@pytest.mark.parametrize("given", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_beams_with_another_cache_or_none(given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_heads": 2,
        "num_layers": 2,
    }
    model = FullT5(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))).eval()
    fixed = {**LONG, "num_beams": 4}
    expected = model.generate(**tiny_inputs(), **fixed)
    assert torch.equal(model.generate(**tiny_inputs(), **fixed, **given), expected)
