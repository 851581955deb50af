"""A checkpoint's weights into a model that is not prepared yet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from pemt.checkpoint.choose import CheckpointError
from pemt.model import make_lazy
from pemt.storage import TensorFile


def load_lazily(weights: TensorFile, trained: Mapping[str, nn.Parameter]) -> None:
    """Have a checkpoint's weights take the place of the model's; each is read when `Engine.prepare` places it.

    Raises:
        CheckpointError: the checkpoint trains other tensors than this run.
    """
    theirs = weights.shapes()
    ours = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{weights.path}: tensor `{name}` is {theirs.get(name, 'missing')} there and "
                f"{ours.get(name, 'not trained')} in this run; use the run's own configuration"
            )
    for name, parameter in trained.items():
        make_lazy(parameter, partial(weights.__getitem__, name))
