"""The one way in which a module says what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import nn


class Trainable(nn.Module, ABC):
    """A module that owns trained parameters and declares them."""

    @abstractmethod
    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What this module trains, without what child `Trainable`s declare themselves."""
