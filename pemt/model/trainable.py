"""The one way a module says what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import nn


class Trainable(nn.Module, ABC):
    """A module that owns trained parameters and declares them."""

    @abstractmethod
    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this module trains; those of child `Trainable`s belong to the children."""


def frozen(tensor_or_parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter, marked as not trained."""
    return tensor_or_parameter.requires_grad_(False)
