"""While PEMT answers, the base model's layers and cache are others: same answers, and nothing of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from pemt.model import answering
from pemt.model.answering import AnswerCache, fast_layers
from tests.tiny_t5 import target_model, tiny_batch, tiny_sources


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every product, by where the weight lies."""
    asked: list[int] = []
    product = answering.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        asked.append(weight.data_ptr())
        return product(x, weight, bias)

    monkeypatch.setattr(answering, "linear", counted)
    return asked


def inputs() -> dict[str, Tensor]:
    batch = tiny_batch((7, 4, 2))
    del batch["labels"]
    return batch


def test_layers_are_afterwards_as_they_were(calls: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    with torch.no_grad(), fast_layers(model):
        hidden = model[0](x)
        assert model[1](hidden) is hidden
        model(x)
    assert len(calls) == 3
    with pytest.raises(KeyboardInterrupt), fast_layers(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())
    assert [model[1].inplace, model[3].inplace] == [False, True]
    calls.clear()
    model(x).sum().backward()
    assert calls == []


def test_what_is_compiled_is_left_alone() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    model[0].compile()
    with fast_layers(model):
        assert not any("forward" in vars(module) for module in model.modules())
        assert not model[1].inplace


def test_a_layer_with_a_forward_of_its_own_keeps_it(calls: list[int]) -> None:
    layer = nn.Linear(4, 2)
    own = layer.forward
    layer.forward = own  # type: ignore[method-assign]
    with torch.no_grad(), fast_layers(nn.Sequential(layer)):
        layer(torch.randn(3, 4))
    assert vars(layer)["forward"] is own
    assert calls == []


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_answers_are_the_same(kind: str, num_beams: int, calls: list[int]) -> None:
    model = target_model(tiny_sources(kind))
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": num_beams}
    tokens, gates = model.answer(**inputs(), **fixed)
    linears = [each for each in model.base.modules() if type(each) is nn.Linear]
    assert {each.weight.data_ptr() for each in linears} <= set(calls)
    # As they are for someone else: F.linear for all, the cache of transformers.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(answering, "linear", nn.functional.linear)
        patched.setattr("pemt.model.mixture.linear", nn.functional.linear)
        theirs = EncoderDecoderCache(DynamicCache(), DynamicCache())
        expected = model.answer(**inputs(), past_key_values=theirs, **fixed)
    assert torch.equal(tokens, expected[0])
    assert gates is not None
    torch.testing.assert_close(gates, expected[1])


def test_the_encoders_keys_stay_where_they_are_while_beams_change_places(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may: those of a sample's beams are equal, and beams keep to their sample."""
    reorder = AnswerCache.reorder_cache
    seen: list[bool] = []

    def watched(cache: AnswerCache, beams: Tensor) -> None:
        before, own = keys_of(cache.cross_attention_cache), keys_of(cache.self_attention_cache)
        reorder(cache, beams)
        after = keys_of(cache.cross_attention_cache)
        assert [id(keys) for keys in before] == [id(keys) for keys in after]
        assert all(torch.equal(keys[beams], keys) for keys in before)
        moved = zip(own, keys_of(cache.self_attention_cache), strict=True)
        assert all(torch.equal(old[beams], new) for old, new in moved)
        seen.append(beams.tolist() != list(range(len(beams))))

    monkeypatch.setattr(AnswerCache, "reorder_cache", watched)
    torch.manual_seed(0)
    model = target_model(tiny_sources("lora"))
    model.generate(**inputs(), max_new_tokens=8, min_new_tokens=8, num_beams=4)
    assert any(seen), "no beam changed places"


def keys_of(cache: Any) -> list[Tensor]:
    return [layer.keys for layer in cache.layers]


@pytest.mark.parametrize(
    "given",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"generation_config": GenerationConfig(use_cache=False)},
    ],
    ids=str,
)
def test_another_cache_can_be_asked_for(given: dict[str, Any]) -> None:
    model = target_model(tiny_sources("lora"))
    assert "past_key_values" not in model.with_cache(given)
    assert isinstance(model.with_cache({})["past_key_values"], AnswerCache)
    theirs = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert model.with_cache({"past_key_values": theirs})["past_key_values"] is theirs
