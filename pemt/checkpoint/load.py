"""A checkpoint's weights into a model that is not prepared yet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from pemt.checkpoint.choose import Checkpoint, CheckpointError
from pemt.model import make_lazy, materialize


def load_lazily(checkpoint: Checkpoint, trained: dict[str, torch.nn.Parameter]) -> None:
    """Have a checkpoint's weights take the place of the model's; each is read when `Engine.prepare` places it.

    Raises:
        CheckpointError: the checkpoint trains other tensors than this run.
    """
    _check_shapes(checkpoint.weights.shapes(), trained, where="checkpoint")
    for name, parameter in trained.items():
        make_lazy(parameter, partial(checkpoint.weights.__getitem__, name))


def copy_weights(
    weights: Mapping[str, Tensor], trained: Mapping[str, torch.nn.Parameter], *, where: str
) -> None:
    """Copy trained weights into a model that is not prepared yet.

    Args:
        weights, trained: by parameter name; both must have the same names and shapes.
        where: what the weights were read from, for the error.

    Raises:
        CheckpointError: they do not.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    _check_shapes(shapes, trained, where=where)
    for name, parameter in trained.items():
        materialize(parameter, weights[name].to(parameter, copy=True))


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], trained: Mapping[str, torch.nn.Parameter], *, where: str
) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    for name in sorted(shapes.keys() ^ wanted.keys()) or [
        key for key in wanted if shapes[key] != wanted[key]
    ]:
        raise CheckpointError(
            f"{where}: tensor `{name}` is {shapes.get(name, 'missing')} there and "
            f"{wanted.get(name, 'not trained')} in this run; use the run's own configuration"
        )
