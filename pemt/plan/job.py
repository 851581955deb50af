"""What is planned: the training, the machines, and how a DeepSpeed JSON splits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pemt.config import PemtError, read_deepspeed_json
from pemt.model import Site
from pemt.plan.shapes import Shape

MOST_EXPERTS = 128  # on a layer; as MAX_EXPERTS of pemt.ops, which would import torch


class PlanError(PemtError):
    """A job that cannot be planned."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training, as a rank sees it.

    Args:
        shape: the base model's sizes.
        method: `source` is stage 1; the others are stage 2 and two of its baselines.
        ranks: the LoRA rank of every expert: of those mixed, or in stage 1 of the one trained.
        ranks_by_site: of every expert, where it is and its rank there, by sites' names; default: `ranks` on every
            FFN's output, as published.
        learned_gates: whether the gates are trained: `mixture.gate`.
        prompt_tokens: of the task's prompt, which lengthens the encoder's input; source_prompt_tokens: of
            all experts' prompts together.
        batch: examples per rank and micro-batch; source, target: tokens of each example.
        accumulation: micro-batches a step.
        bytes_per_value: 2 in bf16 and fp16, 4 in fp32.
    """

    shape: Shape
    method: Literal["pemt", "adapter", "full", "source"] = "pemt"
    ranks: tuple[int, ...] = (64,) * 6
    ranks_by_site: tuple[Mapping[str, int], ...] = ()
    learned_gates: bool = True
    prompt_tokens: int = 20
    source_prompt_tokens: int = 120
    adapter_reduction: int = 16
    train_layer_norms: bool = True
    batch: int = 32
    source: int = 256
    target: int = 16
    accumulation: int = 1
    bytes_per_value: int = 2
    gradient_checkpointing: bool = False

    @property
    def experts(self) -> int:
        """K of the mixture; 0 where none is."""
        return len(self.ranks) if self.method == "pemt" else 0

    @property
    def has_adapters(self) -> bool:
        """Whether every FFN has a target adapter."""
        return self.method in ("pemt", "adapter")

    @property
    def trains_norms(self) -> bool:
        """Whether of a frozen base the layer norms are trained."""
        return self.has_adapters and self.train_layer_norms

    def tokens_at(self, site: Site) -> int:
        """Of one example, those that go through a linear layer."""
        return self.encoder_tokens if site.reads_encoder else self.target

    def ranks_at(self, site: Site) -> tuple[int, ...]:
        """The rank of each expert on a linear layer, of those mixed or in stage 1 of the one trained."""
        if self.method not in ("pemt", "source"):
            return ()
        if not self.ranks_by_site:
            return self.ranks if site.is_ffn_output else ()
        return tuple(ranks[site.name] for ranks in self.ranks_by_site if site.name in ranks)

    def mixed_at(self, site: Site) -> tuple[int, ...]:
        """The ranks of the experts mixed there, none above the output width, as `pemt.ops.orthonormal` has them."""
        _, outputs = site.widths(self.shape.base_shape)
        return tuple(min(rank, outputs) for rank in self.ranks_at(site)) if self.experts else ()

    @property
    def encoder_tokens(self) -> int:
        """Of one example, with its prompt."""
        return self.source + (0 if self.method == "full" else self.prompt_tokens)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator, by its maker's data sheet.

    Args:
        memory: bytes.
        flops: dense bf16 matrix products, FLOP/s.
        bandwidth: memory, byte/s.
        link: to a neighbour in its node, byte/s in one direction.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float


# NVIDIA's data sheets: memory, dense bf16 (half of what is printed "with sparsity"), memory bandwidth, and NVLink
# or PCIe in one direction (half of the printed sum of both).
CHIPS: dict[str, Chip] = {
    "a10-24": Chip(memory=24e9, flops=125e12, bandwidth=600e9, link=32e9),
    "a100-40": Chip(memory=40e9, flops=312e12, bandwidth=1555e9, link=300e9),
    "a100-80": Chip(memory=80e9, flops=312e12, bandwidth=2039e9, link=300e9),
    "l40s-48": Chip(memory=48e9, flops=362e12, bandwidth=864e9, link=32e9),
    "h100-80": Chip(memory=80e9, flops=989e12, bandwidth=3350e9, link=450e9),
    "h200-141": Chip(memory=141e9, flops=989e12, bandwidth=4800e9, link=450e9),
    "b200-180": Chip(memory=180e9, flops=2250e12, bandwidth=7700e9, link=900e9),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines.

    Args:
        nodes, gpus_per_node: how many.
        chip: each GPU.
        network: between nodes, byte/s into and out of each node.
        latency: of one message between nodes, seconds.
        efficiency: share of the chip's rate that matrix products reach.
        backend: `nccl`, or `gloo` on CPUs.
        reserved: bytes of a GPU that the tensors do not get: context, libraries, fragments.
    """

    nodes: int
    gpus_per_node: int
    chip: Chip
    network: float = 25e9
    latency: float = 10e-6
    efficiency: float = 0.4
    backend: Literal["nccl", "gloo"] = "nccl"
    reserved: float = 3e9

    @property
    def world_size(self) -> int:
        """Number of ranks, one a GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Zero:
    """What a DeepSpeed JSON says about splitting, with DeepSpeed 0.19's defaults.

    Args:
        name: the JSON's name.
        bucket: elements of a bucket of gradients.
        buckets: how many there are: two where one is sent while the other fills.
        offload_optimizer, offload_param: masters and moments, and sharded weights, live in CPU memory.
        persistence: stage 3 keeps weights of at most this many elements whole.
        reuse_distance, max_live, prefetch: stage 3's limits, in elements.
        secondary: GPUs that share a second copy of the weights (hpZ); 1 where there is none.
        quantized_weights: weights travel in int8.
    """

    name: str
    stage: int
    bucket: int = 500_000_000
    buckets: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    persistence: int = 100_000
    reuse_distance: int = 1_000_000_000
    max_live: int = 1_000_000_000
    prefetch: int = 50_000_000
    secondary: int = 1
    quantized_weights: bool = False


def read_zero(path: Path) -> Zero:
    """A DeepSpeed JSON as the formulas need it.

    Raises:
        DeepSpeedConfigError: it is malformed.
        PlanError: a value is none that the formulas can take.
    """
    section = read_deepspeed_json(path)["zero_optimization"]
    stage = section["stage"]

    def number(key: str, default: int) -> int:
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(
                f"{path}: zero_optimization.{key}: found {value!r}, a number is needed to plan with"
            )
        return int(value)

    overlapped = section.get("overlap_comm", stage == 3)
    return Zero(
        name=path.name,
        stage=stage,
        bucket=number("reduce_bucket_size", Zero.bucket),
        buckets=2 if overlapped and stage in (1, 2) else 1,
        offload_optimizer=_offloads(section.get("offload_optimizer")),
        offload_param=_offloads(section.get("offload_param")),
        persistence=number("stage3_param_persistence_threshold", Zero.persistence),
        reuse_distance=number("stage3_max_reuse_distance", Zero.reuse_distance),
        max_live=number("stage3_max_live_parameters", Zero.max_live),
        prefetch=number("stage3_prefetch_bucket_size", Zero.prefetch),
        secondary=number("zero_hpz_partition_size", 1),
        quantized_weights=bool(section.get("zero_quantized_weights")),
    )


def _offloads(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"
