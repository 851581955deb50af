"""Parameters whose values stay in a file until the engine wants them.

An unread parameter has shape, dtype and device, but a single element of memory, NaN: modules can be
built around it, and whoever computes with it by mistake gets NaN and no plausible number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_READER = "pemt_reader"


def lazy_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]
) -> nn.Parameter:
    """A parameter on the CPU whose value `read` gives, in whatever dtype its file holds."""
    parameter = nn.Parameter(_nothing(shape, dtype), requires_grad=False)
    setattr(parameter, _READER, read)
    return parameter


def make_lazy(parameter: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Let go of a parameter's value: from now on it is what `read` gives, on the CPU."""
    parameter.data = _nothing(tuple(parameter.shape), parameter.dtype)
    setattr(parameter, _READER, read)


def _nothing(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full((), float("nan"), dtype=dtype).expand(shape)


def is_lazy(parameter: Tensor) -> bool:
    """Whether the parameter's value still lies in its file."""
    return hasattr(parameter, _READER)


def value_of(parameter: Tensor) -> Tensor:
    """The parameter's value, detached; one that is unread stays so.

    A value from a file may be mapped memory in the file's own dtype: take what is wanted of it and
    let it go, and no more than that is ever in memory.
    """
    read: Callable[[], Tensor] | None = getattr(parameter, _READER, None)
    return parameter.detach() if read is None else read()


def materialize(parameter: nn.Parameter, value: Tensor) -> None:
    """Give the parameter a value, as it stands; it counts as read from now on."""
    parameter.data = value
    if is_lazy(parameter):
        delattr(parameter, _READER)


def read_lazy(parameter: nn.Parameter) -> Tensor | None:
    """A lazy parameter's value out of its file, to be put in its place now; None for one that is in memory."""
    if not is_lazy(parameter):
        return None
    value = value_of(parameter)
    delattr(parameter, _READER)
    return value


def materialize_all(module: nn.Module) -> None:
    """Read what is unread, each parameter in its own dtype."""
    for parameter in module.parameters():
        if is_lazy(parameter):
            materialize(parameter, value_of(parameter).to(parameter.dtype, copy=True))
