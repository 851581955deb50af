"""The one way in which a module says what it trains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


class Trainable(nn.Module):
    """A module that declares its trained parameters: all that it has, unless it says otherwise."""

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What this module trains; what child `Trainable`s declare may be among it."""
        yield from self.parameters()
