"""The base model's layers and cache while it answers: the same sums, at less cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from pemt.ops.linear import linear


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Within the block, linear layers call `pemt.ops.linear`, and a ReLU overwrites what it is given.

    A model with compiled blocks keeps its own: other layers would have each block compiled anew.
    """
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    modules = [] if compiled else list(model.modules())
    linears: list[Any] = [
        each for each in modules if type(each) is nn.Linear and "forward" not in vars(each)
    ]
    relus = [each for each in modules if isinstance(each, nn.ReLU) and not each.inplace]
    try:
        for layer in linears:
            layer.forward = MethodType(_forward, layer)
        for layer in relus:
            layer.inplace = True
        yield
    finally:
        for layer in linears:
            vars(layer).pop("forward", None)
        for layer in relus:
            layer.inplace = False


class AnswerCache(EncoderDecoderCache):
    """Keys and values of one `generate`. It grows, whatever the depths of the two stacks.

    Beams change places only with beams of the same sample, and the encoder's keys and values are the
    same for all of them: these stay where they are.
    """

    def __init__(self) -> None:
        super().__init__(DynamicCache(), DynamicCache())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Only the decoder's own keys and values follow their beams."""
        self.self_attention_cache.reorder_cache(beam_idx)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
