"""A model's weights to where they are trained, by the shortest way: from their files, never over the network.

DeepSpeed would have every rank hold the full model, and rank 0 broadcast all of it. The frozen
weights are the same on every rank already, since all read the same files; only trained ones are sent.
"""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pemt.engine.waiting import waiting_of_job

# The value of a parameter that still lies in its file, as the file has it; None for one in memory.
ReadLazy = Callable[[nn.Parameter], "Tensor | None"]


def materialize_on_device(
    model: nn.Module, *, read_lazy: ReadLazy, frozen_dtype: torch.dtype, device: torch.device
) -> None:
    """Read lazy parameters, one at a time, onto the device.

    Args:
        model: changed in place; its frozen parameters get `frozen_dtype`, trained ones keep theirs.
        read_lazy: gives the values that still lie in files.
    """
    for parameter in model.parameters():
        dtype = parameter.dtype if parameter.requires_grad else frozen_dtype
        value = read_lazy(parameter)
        # A mapped file's memory is no place for weights: copied even where nothing changes.
        parameter.data = (
            parameter.data.to(device, dtype)
            if value is None
            else value.to(device, dtype, copy=True)
        )
    for buffer in model.buffers():
        buffer.data = buffer.to(device)


def zero3_init(
    model: nn.Module, deepspeed_config: dict[str, Any], *, read_lazy: ReadLazy, device: torch.device
) -> None:
    """Partition the parameters as ZeRO-3 wants them, reading one at a time: no rank ever holds the model.

    Args:
        model: changed in place.
        read_lazy: gives the values that still lie in files.
        deepspeed_config: with nothing left to `"auto"`.
    """
    ShardedInit(read_lazy, module=model, config_dict_or_path=deepspeed_config)
    for module in model.modules():
        for parameter in getattr(module, "external_parameters", ()):
            deepspeed.zero.register_external_parameter(module, parameter)
    for buffer in model.buffers():  # DeepSpeed leaves them alone where weights are sharded already
        buffer.data = buffer.to(device)


class ShardedInit(deepspeed.zero.Init):
    """DeepSpeed's `zero.Init(module=...)`, which reads lazy parameters and does not broadcast frozen ones.

    Its own would copy each parameter whole to the device and broadcast it from rank 0. This is a private
    corner of DeepSpeed 0.19; tests/launch/test_sharded_start.py counts memory and bytes.
    """

    def __init__(self, read_lazy: ReadLazy, **kwargs: Any) -> None:
        self._read_lazy = read_lazy  # the base class converts the module while it is made
        super().__init__(**kwargs)

    def _convert_to_zero_parameters(self, param_list: Iterable[nn.Parameter]) -> None:
        parameters = list(param_list)
        self._convert([each for each in parameters if not each.requires_grad])
        waiting_of_job().barrier()  # a rank's disk may be slow, and what follows is sent
        self._convert([each for each in parameters if each.requires_grad])

    def _convert(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if is_zero_param(parameter):
                continue
            value = self._read_lazy(parameter)
            parameter.data = (parameter.data if value is None else value).to(
                self.local_device, self.dtype
            )
            self._convert_to_deepspeed_param(parameter)
            if parameter.requires_grad:
                dist.broadcast(parameter.data.view(torch.uint8), 0)
            parameter.partition()  # type: ignore[attr-defined]


@contextlib.contextmanager
def skip_frozen_broadcast(model: nn.Module) -> Iterator[None]:
    """While DeepSpeed or DDP starts, keep its broadcast of the model to what is trained.

    DeepSpeed passes over parameters that have this mark, which is how its OptimizedLinear says that a
    weight is not the same on every rank; nothing else of what we use reads it (DeepSpeed 0.19). DDP
    takes names, and would send the buffers again in every step.
    """
    frozen: list[Any] = [each for each in model.parameters() if not each.requires_grad]
    names = [name for name, each in model.named_parameters() if not each.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    for parameter in frozen:
        parameter.ds_optim_param = True
    try:
        yield
    finally:
        for parameter in frozen:
            del parameter.ds_optim_param
