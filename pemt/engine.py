"""The run's processes, device and optimizer step: the only file that imports accelerate or deepspeed.

ZeRO stage, offload and sharding come from the DeepSpeed JSON that `accelerate launch` was given.
Without one the same calls run in one plain process, or under DDP.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pemt.config import PemtError, RunConfig
from pemt.deepspeed_json import DeepSpeedConfigError, fill_deepspeed_json, read_deepspeed_json

# One line per collective otherwise, from inside DeepSpeed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

deepspeed.utils.logger.setLevel("WARNING")

MOMENTS = ("exp_avg", "exp_avg_sq")


class EngineError(PemtError):
    """The launcher, accelerate and DeepSpeed do not agree on what this job is."""


class Engine:
    """One run on this job's processes.

    Args:
        config: the run's configuration; batch size, accumulation, clipping and precision come from it.

    Several runs may follow one another in one job; `release` ends one.

    Raises:
        EngineError: the launcher's WORLD_SIZE differs from accelerate's number of processes.
        DeepSpeedConfigError: the DeepSpeed JSON is malformed or contradicts the configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        plugin, path = self._deepspeed_plugin(config)
        # accelerate keeps one state per process; a second run needs its own DeepSpeed configuration.
        AcceleratorState._reset_state()
        self._accelerator = Accelerator(
            # Under DeepSpeed the precision stands in its configuration.
            mixed_precision=None
            if plugin
            else "bf16"
            if config.bf16
            else "fp16"
            if config.fp16
            else "no",
            deepspeed_plugin=plugin,
            kwargs_handlers=self._process_group_kwargs(),
        )
        # transformers would hand out empty shards at stage 3; PEMT's modules are built on whole weights,
        # which `prepare` then shards.
        unset_hf_deepspeed_config()
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self.device: torch.device = self._accelerator.device
        check_world_size(self.world_size)
        self.zero_stage: int | None = plugin.zero_stage if plugin else None
        self._deepspeed_json = path

    @staticmethod
    def _deepspeed_plugin(config: RunConfig) -> tuple[DeepSpeedPlugin | None, Path | None]:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
            return None, None
        name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if name is None:
            raise DeepSpeedConfigError(
                "accelerate launch: no DeepSpeed JSON; give one with --deepspeed_config_file ds_configs/zero2.json"
            )
        path = Path(name)
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        filled = fill_deepspeed_json(
            read_deepspeed_json(path), config, world_size=world_size, path=path
        )
        return DeepSpeedPlugin(hf_ds_config=filled, zero3_init_flag=False), path

    @staticmethod
    def _process_group_kwargs() -> list[InitProcessGroupKwargs]:
        # On a machine without GPU accelerate names no backend, and launched ranks never find each other.
        launched = "LOCAL_RANK" in os.environ
        return (
            [InitProcessGroupKwargs(backend="gloo")]
            if launched and not torch.cuda.is_available()
            else []
        )

    def seed(self, seed: int, *, per_rank: bool) -> None:
        """Seed every generator: alike on all ranks for initialisation, differently for dropout."""
        set_seed(seed, device_specific=per_rank)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hand model and optimizer to DeepSpeed or DDP.

        Args:
            model: `requires_grad` is already set and the optimizer holds the trained parameters alone.
            optimizer: an AdamW in one parameter group.
        """
        self.module = model
        self.base_optimizer = optimizer
        self.model, self.optimizer = self._accelerator.prepare(model, optimizer)
        if self.zero_stage is not None:
            # Where moments are offloaded, accelerate has put DeepSpeed's CPU Adam in its place.
            self.base_optimizer = self.model.basic_optimizer
        self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._masters = self._fp32_masters()
        # At stage 0 in half precision DeepSpeed takes an empty step to make the states, and Adam counts it.
        self._set_adam_step(0)
        if self.zero_stage is not None:
            self._check_deepspeed_agrees()

    def _check_deepspeed_agrees(self) -> None:
        config = self._config
        for what, theirs, ours in (
            ("world size", self.model.dp_world_size, self.world_size),
            (
                "micro batch",
                self.model.train_micro_batch_size_per_gpu(),
                config.per_device_train_batch_size,
            ),
            (
                "accumulation",
                self.model.gradient_accumulation_steps(),
                config.gradient_accumulation_steps,
            ),
            ("gradient clipping", self.model.gradient_clipping(), config.max_grad_norm),
            ("bf16", self.model.bfloat16_enabled(), config.bf16),
            ("fp16", self.model.fp16_enabled(), config.fp16),
        ):
            if theirs != ours:
                raise EngineError(
                    f"{self._deepspeed_json}: DeepSpeed runs with {what} {theirs}, this run wants {ours}"
                )

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision for calls that do not go through the prepared model's forward."""
        return self._accelerator.autocast()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of one micro-batch.

        Args:
            loss: scalar, the mean over the micro-batch; the division by the accumulation is done here.
            last: whether this micro-batch completes the step, so that ranks reduce their gradients.
        """
        if self.zero_stage is not None:
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            self.model.backward(loss)
            return
        loss = loss / self._config.gradient_accumulation_steps
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self.model):
            self._accelerator.backward(loss)

    def step(self) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping."""
        if self.zero_stage is not None:
            # Stage 0 in fp32 does not tell its norm; gradients are whole there, and not yet clipped.
            gradients = [p.grad for _, p in self._trained if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients) if self.zero_stage == 0 else None
            self.model.step()
            told: Any = self.model.get_global_grad_norm()
            return float(norm if told is None else told)  # type: ignore[arg-type]
        limit = self._config.max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_([p for _, p in self._trained], limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    # Collectives: every rank calls them equally often.

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks along dimension 0; the same shape on every rank."""
        return self._accelerator.gather(tensor.contiguous())

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks."""
        return self._accelerator.reduce(tensor, reduction="mean")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self._accelerator.reduce(tensor, reduction="sum")

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return broadcast_object_list([value])[0]

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def build_first(self) -> Iterator[None]:
        """One process a node runs the block first; the others then find what it built."""
        with self._accelerator.local_main_process_first():
            yield

    # The trained state, whole, whatever the ZeRO stage.

    def trained_weights(self) -> dict[str, Tensor]:
        """Full fp32 copies on the CPU of every trained parameter, by name (all ranks call)."""
        return {
            name: self._full_weight(p).detach().float().cpu().clone() for name, p in self._trained
        }

    def optimizer_moments(self) -> dict[str, Tensor]:
        """AdamW's moments, full and fp32, as `<parameter>.<exp_avg|exp_avg_sq>` (all ranks call)."""
        moments = {}
        for name, parameter in self._trained:
            for key in MOMENTS:
                if self._is_sharded(parameter):
                    full = safe_get_full_optimizer_state(parameter, key)
                else:
                    full = self._moment(parameter, key)
                moments[f"{name}.{key}"] = full.detach().float().cpu().clone()
        return moments

    def load_optimizer_state(
        self,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        *,
        step: int,
        batch: dict[str, Tensor],
    ) -> None:
        """Put a saved optimizer in place (all ranks call); the weights went into the model before `prepare`.

        Args:
            weights: what `trained_weights` gave: under bf16 the fp32 masters know more than the model does.
            moments: what `optimizer_moments` gave.
            step: optimizer steps that they have seen.
            batch: any training batch: DeepSpeed makes its optimizer state in the first step, so one is
                taken with a zero loss at learning rate zero.
        """
        rates = [group["lr"] for group in self.base_optimizer.param_groups]
        for group in self.base_optimizer.param_groups:
            group["lr"] = 0.0
        for micro in range(self._config.gradient_accumulation_steps):
            last = micro == self._config.gradient_accumulation_steps - 1
            self.backward(self.model(**batch).loss * 0.0, last=last)
        self.step()
        for group, rate in zip(self.base_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for name, parameter in self._trained:
            if self._is_sharded(parameter):
                self._set_sharded(parameter, weights[name], None)
            elif parameter in self._masters:
                self._masters[parameter].data.copy_(weights[name])
            for key in MOMENTS:
                if self._is_sharded(parameter):
                    self._set_sharded(parameter, moments[f"{name}.{key}"], key)
                else:
                    self._moment(parameter, key).copy_(moments[f"{name}.{key}"])
        self._set_adam_step(step)

    def _set_adam_step(self, step: int) -> None:
        for state in self.base_optimizer.state.values():
            if isinstance(state["step"], Tensor):
                state["step"].fill_(step)
            else:  # DeepSpeed's CPU Adam counts in a plain number
                state["step"] = step

    def _set_sharded(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Write an fp32 master (`key` None) or a moment of a parameter that DeepSpeed holds in shares."""
        if not hasattr(parameter, "ds_id"):
            value = value.to(self.device)
            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
            return
        # At stage 3 DeepSpeed's own setters fail where the ranks do not divide the parameter.
        share = cast("Any", parameter).ds_tensor.ds_numel
        padded = nn.functional.pad(value.flatten(), (0, share * self.world_size - value.numel()))
        mine = padded.narrow(0, share * self.rank, share).to(self.device)
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)

    def random_states(self) -> dict[str, Tensor]:
        """Every rank's generators, one row a rank (all ranks call)."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            kind: self.gather(state[None].to(self.device)).cpu() for kind, state in states.items()
        }

    def load_random_states(self, states: dict[str, Tensor]) -> None:
        """Put this rank's generators back; a rank that did not exist then keeps its own."""
        # Cloned, since torch crashes on a state that is a row of a larger tensor.
        if self.rank < len(states["cpu"]):
            torch.set_rng_state(states["cpu"][self.rank].clone())
        if self.device.type == "cuda" and self.rank < len(states.get("cuda", ())):
            torch.cuda.set_rng_state(states["cuda"][self.rank].clone(), self.device)

    def load_trained_weights(self, weights: dict[str, Tensor]) -> None:
        """Overwrite the prepared model's trained parameters, for evaluation (all ranks call).

        The optimizer's fp32 masters keep their values: train no further after this.
        """
        for name, parameter in self._trained:
            with (
                deepspeed.zero.GatheredParameters(
                    [parameter], modifier_rank=0, enabled=self.zero_stage == 3
                ),
                torch.no_grad(),
            ):
                if self.zero_stage != 3 or self.is_main:
                    parameter.copy_(weights[name])

    @staticmethod
    def _is_sharded(parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _full_weight(self, parameter: nn.Parameter) -> Tensor:
        if self._is_sharded(parameter):
            return safe_get_full_fp32_param(parameter)
        return self._masters.get(parameter, parameter)

    def _fp32_masters(self) -> dict[nn.Parameter, nn.Parameter]:
        """At stage 0 in half precision DeepSpeed pairs each parameter with an fp32 master, in order."""
        wrapper: Any = getattr(self.model, "optimizer", None)
        if self.zero_stage != 0 or not hasattr(wrapper, "fp32_groups"):
            return {}
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        return {half: full for group in pairs for half, full in zip(*group, strict=True)}

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self.base_optimizer.state[self._masters.get(parameter, parameter)][key]

    def release(self) -> None:
        """Free the run's model and optimizer; the process group lives on for the next run."""
        del self.module, self.model, self.optimizer, self.base_optimizer
        del self._trained, self._masters
        self._accelerator.free_memory()
        gc.collect()


def full_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, of which ZeRO-3 leaves this rank an empty shell."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shut_down() -> None:
    """End the process group, all ranks together: a rank that leaves early may abort the others."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def check_world_size(num_processes: int) -> None:
    """Refuse to train N copies of the same run side by side.

    Raises:
        EngineError: WORLD_SIZE, as the launcher set it, is not accelerate's number of processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != num_processes:
        raise EngineError(
            f"WORLD_SIZE: the launcher started {launched} ranks, but accelerate sees {num_processes}; every rank "
            "would train alone on all the data. Set `use_cpu: false` and `distributed_type: DEEPSPEED` in the "
            "accelerate config (see launchers/accelerate/)"
        )
