"""The trained state, whole on the CPU, whatever the ZeRO stage and the number of ranks.

At stages 1, 2 and 3 DeepSpeed holds fp32 masters and moments in shares; at stage 0 in half precision
it wraps the optimizer; without it they lie in the optimizer itself. All of that ends here.
"""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

from collections.abc import Mapping
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from pemt.engine.job import Job

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """Weights and AdamW moments of what a prepared model trains.

    Args:
        model: the unprepared module, whose parameters DeepSpeed has taken over.
        optimizer: the optimizer that steps, beneath every wrapper.
        wrapper: what DeepSpeed put around it; None without DeepSpeed.
        zero_stage: None without DeepSpeed.
        job: its ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        wrapper: Any,
        *,
        zero_stage: int | None,
        job: Job,
    ) -> None:
        self.parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._optimizer = optimizer
        self._zero_stage, self._job = zero_stage, job
        self._masters = _fp32_masters(wrapper) if zero_stage == 0 else {}
        # At stage 0 in half precision DeepSpeed takes an empty step to make the states, and Adam counts it.
        self._set_adam_step(0)

    def weights(self) -> dict[str, Tensor]:
        """On rank 0 full fp32 copies on the CPU of every trained parameter, by name (all ranks call)."""
        weights = {}
        for name, parameter in self.parameters:
            full = self._full_weight(parameter)
            if self._job.is_main:
                weights[name] = _copy(full)
        return weights

    def moments(self) -> dict[str, Tensor]:
        """On rank 0 AdamW's moments, full and fp32, as `<parameter>.<exp_avg|exp_avg_sq>` (all ranks call).

        Zeros before the first step that was not skipped: DeepSpeed has made none yet.
        """
        moments = {}
        for name, parameter in self.parameters:
            for key in MOMENTS:
                if not self._optimizer.state:
                    full = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
                elif _is_sharded(parameter):
                    full = safe_get_full_optimizer_state(parameter, key)
                else:
                    full = self._moment(parameter, key)
                if self._job.is_main:
                    moments[f"{name}.{key}"] = _copy(full)
        return moments

    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, step: int
    ) -> None:
        """Put a saved optimizer in place (all ranks call); its states exist since a first step.

        A value is asked for when it is needed, and released before the next one.

        Args:
            weights: what `weights` gave; they fill the fp32 masters, not the model's own copies.
            moments: what `moments` gave.
            step: optimizer steps that they have seen.
        """
        for name, parameter in self.parameters:
            if _is_sharded(parameter):
                self._set_sharded(parameter, weights[name], None)
            elif parameter in self._masters:
                self._masters[parameter].data.copy_(weights[name])
            for key in MOMENTS:
                if _is_sharded(parameter):
                    self._set_sharded(parameter, moments[f"{name}.{key}"], key)
                else:
                    self._moment(parameter, key).copy_(moments[f"{name}.{key}"])
        self._set_adam_step(step)

    def overwrite_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the model's trained parameters, for evaluation (all ranks call).

        The optimizer's fp32 masters keep their values: train no further after this.
        """
        for name, parameter in self.parameters:
            with (
                deepspeed.zero.GatheredParameters(
                    [parameter], modifier_rank=0, enabled=self._zero_stage == 3
                ),
                torch.no_grad(),
            ):
                if self._zero_stage != 3 or self._job.is_main:
                    parameter.copy_(weights[name])

    def _set_adam_step(self, step: int) -> None:
        for state in self._optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(step)
            else:  # DeepSpeed's CPU Adam counts in a plain number
                state["step"] = step

    def _set_sharded(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write an fp32 master (`key` None) or a moment of a parameter that DeepSpeed holds in shares."""
        if not hasattr(parameter, "ds_id"):
            value = value.to(self._job.device)
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        # At stage 3 DeepSpeed's own setters fail where the ranks do not divide the parameter.
        job, share = self._job, cast("Any", parameter).ds_tensor.ds_numel
        padded = nn.functional.pad(value.flatten(), (0, share * job.world_size - value.numel()))
        mine = padded.narrow(0, share * job.rank, share).to(job.device)
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        if _is_sharded(parameter):
            return safe_get_full_fp32_param(parameter)
        return self._masters.get(parameter, parameter)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._optimizer.state[self._masters.get(parameter, parameter)][key]


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _fp32_masters(wrapper: Any) -> dict[nn.Parameter, nn.Parameter]:
    """At stage 0 in half precision DeepSpeed pairs each parameter with an fp32 master, in order."""
    if not hasattr(wrapper, "fp32_groups"):
        return {}
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return {half: full for group in pairs for half, full in zip(*group, strict=True)}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()


def full_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, of which ZeRO-3 leaves this rank an empty shell."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
