"""Answers on a CPU through oneDNN's products: the same answers, and the layers are afterwards as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pemt.model import onednn
from pemt.model.onednn import linear, onednn_layers
from tests.tiny_t5 import target_model, tiny_batch, tiny_sources

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)

SHAPES = [(3, 8, 5), (1, 1, 7), (2, 9, 33)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every product that oneDNN is asked for, by where the weight lies."""
    asked: list[int] = []
    product = torch.ops.mkldnn._linear_pointwise

    def counted(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[1].data_ptr())
        return product(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return asked


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_a_linear_layer(
    shape: tuple[int, ...], bias: bool, calls: list[int]
) -> None:
    layer = nn.Linear(shape[-1], 6, bias=bias)
    every_other = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    with torch.no_grad():
        for x in (torch.randn(shape), every_other, torch.randn(0, *shape[1:])):
            torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
    assert len(calls) == 3


def test_where_it_does_not_serve(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None, "a gradient is wanted"
    with torch.no_grad():
        linear(x.double(), layer.weight.double())
        linear(x.bfloat16(), layer.weight.bfloat16())
        linear(x.to("meta"), layer.weight.to("meta"))
        with torch.backends.mkldnn.flags(enabled=False):
            linear(x, layer.weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, layer.weight.bfloat16()).dtype == torch.bfloat16
            assert linear(x, layer.weight).dtype == torch.bfloat16
        monkeypatch.setattr(onednn, "_is_there", lambda: False)
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
    assert calls == []


def test_layers_are_afterwards_as_they_were(calls: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    with torch.no_grad(), onednn_layers(model):
        model(x)
    assert len(calls) == 2
    with pytest.raises(KeyboardInterrupt), onednn_layers(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())
    calls.clear()
    model(x).sum().backward()
    assert calls == []


def test_what_is_compiled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    model[0].compile()
    with onednn_layers(model):
        assert not any("forward" in vars(module) for module in model.modules())

    def asked() -> bool:
        raise AssertionError("a compiler's products are its own")

    monkeypatch.setattr(onednn, "_is_there", asked)
    with torch.no_grad():
        torch.compile(linear, backend="eager")(torch.randn(2, 4), torch.randn(3, 4))
        with pytest.raises(AssertionError, match="its own"):
            linear(torch.randn(2, 4), torch.randn(3, 4))


def test_a_layer_with_a_forward_of_its_own_keeps_it(calls: list[int]) -> None:
    layer = nn.Linear(4, 2)
    own = layer.forward
    layer.forward = own  # type: ignore[method-assign]
    with torch.no_grad(), onednn_layers(nn.Sequential(layer)):
        layer(torch.randn(3, 4))
    assert vars(layer)["forward"] is own
    assert calls == []


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_the_answers_are_the_same(kind: str, calls: list[int]) -> None:
    model = target_model(tiny_sources(kind))
    batch = tiny_batch((7, 4, 2))
    del batch["labels"]
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6}
    tokens, gates = model.answer(**batch, **fixed)
    linears = [each for each in model.base.modules() if type(each) is nn.Linear]
    assert {each.weight.data_ptr() for each in linears} <= set(calls)
    calls.clear()
    with torch.backends.mkldnn.flags(enabled=False):
        expected = model.answer(**batch, **fixed)
    assert calls == []
    assert torch.equal(tokens, expected[0])
    assert gates is not None
    torch.testing.assert_close(gates, expected[1])
