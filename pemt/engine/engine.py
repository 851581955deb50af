"""The model of a run on the job's ranks: device, precision, optimizer step.

ZeRO stage, offload and sharding come from the DeepSpeed JSON that `accelerate launch` was given.
Without one the same calls run in one plain process, or under DDP.
"""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

import contextlib
import math
import warnings
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pemt.config import RunConfig
from pemt.engine.job import Job
from pemt.engine.launcher import EngineError, bf16_is_native_everywhere, deepspeed_plugin
from pemt.engine.optimizer_state import OptimizerState
from pemt.engine.placement import ReadLazy, materialize_on_device, skip_frozen_broadcast, zero3_init
from pemt.engine.precision import precision_text, resolve_precision, warn_of_emulation
from pemt.engine.trackers import Tracker

# One line per collective otherwise, from inside DeepSpeed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")


class Engine(Job):
    """One run on this job's processes.

    Args:
        config: the run's configuration; batch size, accumulation, clipping and precision come from it. The attribute of
            this name has `bf16` decided, alike on all ranks.

    Several runs may follow one another in one job; `release` ends one.

    Raises:
        EngineError: the launcher's WORLD_SIZE differs from accelerate's number of processes.
        DeepSpeedConfigError: the DeepSpeed JSON is malformed or contradicts the configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        # accelerate keeps one state per process; a second run needs its own DeepSpeed configuration.
        AcceleratorState._reset_state()
        # The process group first: the ranks agree on the precision, which DeepSpeed's configuration holds.
        super().__init__(config)
        self.trackers: list[Tracker] = []  # rank 0's, once they are open
        native = bf16_is_native_everywhere(self.device)
        self.config = config = resolve_precision(config, native=native)
        self.precision = precision_text(config, native=native)
        self._plugin, self._deepspeed_json = deepspeed_plugin(config)
        half = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
        # Under DeepSpeed the precision stands in its configuration.
        self._accelerator = Accelerator(
            mixed_precision=None if self._plugin else half, deepspeed_plugin=self._plugin
        )
        # transformers would hand out empty shards at stage 3; PEMT's modules are built on weights that are
        # whole by their shape, and unread: `prepare` shards them.
        unset_hf_deepspeed_config()
        self.zero_stage: int | None = self._plugin.zero_stage if self._plugin else None
        if config.bf16 and not native and self.is_main:
            warn_of_emulation(self.device)

    def seed(self, seed: int, *, per_rank: bool) -> None:
        """Seed every generator: alike on all ranks for initialisation, differently for dropout."""
        # A rank's own must be in numpy's range too.
        set_seed((seed + self.rank * per_rank) % 2**32)

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        read_lazy: ReadLazy = lambda _: None,
    ) -> None:
        """Read the model's weights, hand it and the optimizer to DeepSpeed or DDP.

        Args:
            model: `requires_grad` is already set and the optimizer holds the trained parameters alone.
            optimizer: an AdamW in one parameter group.
            read_lazy: gives the values of parameters that still lie in files.
        """
        self.module = model
        self.base_optimizer = optimizer
        with self.together("reading the model's weights"):
            self._materialize(model, read_lazy)
        with skip_frozen_broadcast(model):
            self.model, self.optimizer = self._accelerator.prepare(model, optimizer)
        if self.zero_stage is not None:
            # Where moments are offloaded, accelerate has put DeepSpeed's CPU Adam in its place.
            self.base_optimizer = self.model.basic_optimizer
        wrapper = getattr(self.model, "optimizer", None)
        self.optimizer_state = OptimizerState(
            model, self.base_optimizer, wrapper, zero_stage=self.zero_stage, job=self
        )
        if self.zero_stage is not None:
            self._check_deepspeed_agrees()

    def _materialize(self, model: nn.Module, read_lazy: ReadLazy) -> None:
        if self._plugin and self.zero_stage == 3:
            zero3_init(
                model, self._plugin.deepspeed_config, read_lazy=read_lazy, device=self.device
            )
            return
        # Without DeepSpeed fp16 autocasts, and T5 keeps parts of itself in fp32.
        half = torch.float16 if self.config.fp16 and self._plugin else torch.float32
        frozen_dtype = torch.bfloat16 if self.config.bf16 else half
        materialize_on_device(
            model, read_lazy=read_lazy, frozen_dtype=frozen_dtype, device=self.device
        )

    def _check_deepspeed_agrees(self) -> None:
        model, config = self.model, self.config
        micro_batch = model.train_micro_batch_size_per_gpu()
        accumulation = model.gradient_accumulation_steps()
        for what, theirs, ours in (
            ("world size", model.dp_world_size, self.world_size),
            ("micro batch", micro_batch, config.per_device_train_batch_size),
            ("accumulation", accumulation, config.gradient_accumulation_steps),
            ("gradient clipping", model.gradient_clipping(), config.max_grad_norm),
            ("bf16", model.bfloat16_enabled(), config.bf16),
            ("fp16", model.fp16_enabled(), config.fp16),
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
            loss: scalar; the step's gradient is that of the mean over its micro-batches on all ranks.
            last: whether this micro-batch completes the step, so that ranks reduce their gradients.

        A loss that is not finite on one rank makes its gradients NaN, and these are how the others hear of
        it: `step` is then skipped by all.
        """
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        if self.zero_stage is not None:
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            self.model.backward(loss)
            return
        loss = loss / self.config.gradient_accumulation_steps
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self.model):
            self._accelerator.backward(loss)

    def step(self) -> float:
        """Clip, update and clear the gradients; the global gradient norm before clipping.

        Where loss or gradient was not finite on any rank, no rank updates anything, and the norm is NaN.
        """
        if self.zero_stage is None:
            limit = self.config.max_grad_norm or float("inf")
            trained = [parameter for _, parameter in self.optimizer_state.parameters]
            norm = float(self._accelerator.clip_grad_norm_(trained, limit))
            # fp16's loss scaler skips the step itself, and lowers its scale
            if math.isfinite(norm) or self._accelerator.scaler is not None:
                self.optimizer.step()
            self.optimizer.zero_grad()
            return norm if math.isfinite(norm) else math.nan
        if self.zero_stage == 0 and not (self.config.bf16 or self.config.fp16):
            return self._plain_deepspeed_step()
        self.model.step()
        # Stage 1 to 3 and half precision check for themselves, and all ranks come to the same result.
        if self.model.optimizer.overflow:
            return math.nan
        return float(self.model.get_global_grad_norm())

    def _plain_deepspeed_step(self) -> float:
        """At stage 0 in fp32 DeepSpeed tells no norm and checks nothing; gradients are whole there, and unclipped."""
        gradients = [p.grad for _, p in self.optimizer_state.parameters if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.model.zero_grad()
            return math.nan
        self.model.step()
        return norm

    def load_optimizer_state(
        self,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        *,
        step: int,
        batch: dict[str, Tensor],
    ) -> None:
        """Put a saved optimizer in place (all ranks call); the weights went into the model before `prepare`.

        Args:
            weights: what `optimizer_state.weights` gave: under bf16 the fp32 masters know more than the model does.
            moments: what `optimizer_state.moments` gave.
            step: optimizer steps that they have seen.
            batch: any batch: DeepSpeed makes its optimizer state in the first step, so one is taken with a
                zero loss at learning rate zero.

        Raises:
            EngineError: the model gives no finite number for that batch.
        """
        rates = [group["lr"] for group in self.base_optimizer.param_groups]
        for group in self.base_optimizer.param_groups:
            group["lr"] = 0.0
        for micro in range(self.config.gradient_accumulation_steps):
            last = micro == self.config.gradient_accumulation_steps - 1
            self.backward(self.model(**batch).loss * 0.0, last=last)
        if not math.isfinite(self.step()):
            raise EngineError(
                "the model gives NaN or Inf for a single token; train in bf16 or fp32"
            )
        for group, rate in zip(self.base_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer_state.restore(weights, moments, step=step)

    def random_states(self) -> dict[str, Tensor]:
        """Every rank's generators, one row a rank (all ranks call)."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            kind: self.gather(state[None].to(self.device)).cpu() for kind, state in states.items()
        }

    def load_random_states(self, states: Mapping[str, Tensor]) -> None:
        """Put this rank's generators back; a rank that did not exist then keeps its own."""
        # Cloned, since torch crashes on a state that is a row of a larger tensor.
        if self.rank < len(states["cpu"]):
            torch.set_rng_state(states["cpu"][self.rank].clone())
        if self.device.type == "cuda" and self.rank < len(states.get("cuda", ())):
            torch.cuda.set_rng_state(states["cuda"][self.rank].clone(), self.device)

    def release(self) -> None:
        """Free the run's model and optimizer, if it has come so far; the process group lives on for the next run."""
        for name in ("module", "model", "optimizer", "base_optimizer", "optimizer_state"):
            vars(self).pop(name, None)
        self._accelerator.free_memory()  # and collects what is garbage
