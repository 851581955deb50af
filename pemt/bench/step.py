"""`pemt bench step`: a whole training step of stage 2, with the experts mixed in three ways and without any.

B batch, S tokens, F d_ff, D d_model, K experts, R rank.

`pemt bench step --help` (commands/bench.py) tells what is compared, and how.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import sub, truediv
from typing import Any

import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from pemt.bench.layer import ADAPTER_REDUCTION, EXPERTS, RANK, forced
from pemt.bench.model import random_sources, random_t5
from pemt.bench.op import in_turn, time_once
from pemt.config import AdapterConfig, MixtureConfig
from pemt.engine import peak, watch_peak
from pemt.model import MIXTURES, LoraMixture, PemtT5, Site, base_shape, target_sites
from pemt.ops import reference
from pemt.plan import CHIPS, KNOWN, Job, Shape, flops

VARIANTS = ("adapter", "loop", "packed", "fused")
PUBLISHED_SITES = ("wo",)
PROMPT_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """What to measure.

    Args:
        size: a name in `pemt.plan.shapes.KNOWN`.
        batch: examples; source, target: tokens of each.
        device: cpu or cuda; dtype: a name in torch.
        rounds: how often every variant is timed.
        chip: a name in `pemt.plan.job.CHIPS`, to tell the share of its rate; None to tell none.
        layers: of each stack, in place of the size's own; a few stand for all of a large model.
        sites: where the experts are, as `expert.target_modules` names it; by default where published ones are.
        experts: how many; rank: of each.
    """

    size: str = "t5-small"
    batch: int = 8
    source: int = 128
    target: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 20
    chip: str | None = None
    layers: int | None = None
    sites: Sequence[str] = PUBLISHED_SITES
    experts: int = EXPERTS
    rank: int = RANK

    @property
    def variants(self) -> tuple[str, ...]:
        """Of VARIANTS; the loop over experts is written for an FFN's output alone."""
        published = tuple(self.sites) == PUBLISHED_SITES
        return tuple(each for each in VARIANTS if published or each != "loop")

    @property
    def shape(self) -> Shape:
        """The size's own, with as many layers as asked for."""
        known = KNOWN[self.size]
        if self.layers is None:
            return known
        return replace(known, num_layers=self.layers, num_decoder_layers=self.layers)

    def expert_sites(self) -> list[Site]:
        """The linear layers that every expert is on."""
        return target_sites(list(self.sites), self.shape.base_shape)

    def job(self, variant: str) -> Job:
        """The step as the planner sees it."""
        return Job(
            shape=self.shape,
            method="adapter" if variant == "adapter" else "pemt",
            ranks=(self.rank,) * self.experts,
            ranks_by_site=({site.name: self.rank for site in self.expert_sites()},) * self.experts,
            prompt_tokens=PROMPT_TOKENS,
            source_prompt_tokens=self.experts * PROMPT_TOKENS,
            adapter_reduction=ADAPTER_REDUCTION,
            batch=self.batch,
            source=self.source,
            target=self.target,
            bytes_per_value=getattr(torch, self.dtype).itemsize,
        )


class LoopMixture(LoraMixture):
    """The experts one after another, and once more for the cosines: what `pemt.ops` is held against."""

    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        gates_BK = self._gates(x_BSF)
        weight_DF, down_NF = self.weight.split(self.sizes)
        frozen = (weight_DF, down_NF, self.up)
        z_BSD, loss = reference.ffn_output(
            x_BSF, *frozen, gates_BK, self.adapter_tensors, self.scales, self.ranks, self.token_weights_BS
        )  # fmt: skip
        return z_BSD, loss if sparsity else None, gates_BK.detach()


class Step:
    """One variant's model, optimizer and batch; calling it takes one training step."""

    def __init__(self, bench: StepBench, variant: str) -> None:
        self.implementation = bench.device if variant == "fused" else "packed"
        self.model = build_model(bench, variant)
        self.trained = [parameter for _, parameter in self.model.trainable_parameters()]
        # As DeepSpeed trains: what is below half precision's resolution adds up in masters.
        half = bench.dtype != "float32"
        self.masters = [each.detach().float() for each in self.trained] if half else self.trained
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4)
        torch.manual_seed(0)
        draw = partial(torch.randint, 2, 32_000, device=bench.device)
        self.batch = {
            "input_ids": draw((bench.batch, bench.source)),
            "attention_mask": torch.ones(bench.batch, bench.source, device=bench.device).long(),
            "labels": draw((bench.batch, bench.target)),
        }

    def __call__(self) -> float:
        """The loss before the step."""
        with forced(self.implementation):
            loss = self.model(**self.batch).loss
            loss.backward()
        if self.masters is self.trained:
            self.optimizer.step()
        else:
            self._step_masters()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def _step_masters(self) -> None:
        for master, parameter in zip(self.masters, self.trained, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.trained, strict=True):
            parameter.copy_(master)

    def held_bytes(self) -> int:
        """What lies between two steps: weights, buffers, masters, moments."""
        held = {*self.model.parameters(), *self.model.buffers(), *self.masters}
        for state in self.optimizer.state.values():
            held |= {each for each in state.values() if isinstance(each, Tensor)}
        return sum(each.nbytes for each in held)


def plain_base(bench: StepBench) -> T5ForConditionalGeneration:
    """A random T5 of this size; always the same weights."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        return random_t5(bench.shape, getattr(torch, bench.dtype))


def build_model(bench: StepBench, variant: str) -> PemtT5:
    """A stage-2 model of this size; the same weights for every variant."""
    base = plain_base(bench)
    ranks = () if variant == "adapter" else (bench.rank,) * bench.experts
    with torch.device(bench.device):
        sources = random_sources(
            base_shape(base.config),
            ranks=ranks,
            prompt_tokens=PROMPT_TOKENS,
            sites=[bench.expert_sites()] * bench.experts,
        )
        prompt_PD = torch.randn(PROMPT_TOKENS, base.config.d_model)
    shipped = MIXTURES["lora"]
    try:
        if variant == "loop":
            MIXTURES["lora"] = LoopMixture
        return PemtT5.target(
            base,
            sources=sources,
            mixture=MixtureConfig(),
            adapter=AdapterConfig(reduction_factor=ADAPTER_REDUCTION),
            prompt_PD=prompt_PD,
        ).train()
    finally:
        MIXTURES["lora"] = shipped


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that a call takes above what is held before it."""
    before = watch_peak(torch.device(device))
    run()
    return peak(torch.device(device)) - before


@dataclass(kw_only=True)
class Taken:
    """One variant's steps.

    Args:
        first_loss: before any step.
        milliseconds: of the step in each round.
        held_bytes: between steps; peak_bytes: of a step, above that.
    """

    first_loss: float
    milliseconds: list[float]
    held_bytes: int
    peak_bytes: int


def take(bench: StepBench, variants: Sequence[str]) -> dict[str, Taken]:
    """Takes the steps of these variants, in turn; nothing of them is held afterwards."""
    steps = {name: Step(bench, name) for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    losses = {}
    for name, step in steps.items():  # warm-up; builds kernels and moments
        torch.manual_seed(1)  # the same dropout for all
        losses[name] = step()
    for name in in_turn(variants, bench.rounds):
        times[name].append(time_once(steps[name], bench.device))
    return {
        name: Taken(
            first_loss=losses[name],
            milliseconds=times[name],
            held_bytes=step.held_bytes(),
            peak_bytes=peak_bytes(step, bench.device),
        )
        for name, step in steps.items()
    }


def measure(bench: StepBench) -> dict[str, Any]:
    """Times all variants and measures their memory; on a GPU one after another."""
    variants = bench.variants
    groups = [variants] if bench.device == "cpu" else [(name,) for name in variants]
    taken: dict[str, Taken] = {}
    for group in groups:
        taken |= take(bench, group)
    tokens = bench.batch * (bench.source + PROMPT_TOKENS + bench.target)
    medians = {name: statistics.median(each.milliseconds) for name, each in taken.items()}
    without = taken["adapter"].milliseconds
    needed = {name: flops(bench.job(name)) for name in variants}
    rates = {name: needed[name] / medians[name] / 1e9 for name in variants}  # TFLOP/s
    result: dict[str, Any] = {
        **asdict(bench),
        "threads": torch.get_num_threads(),
        "first_loss": {name: each.first_loss for name, each in taken.items()},
        "milliseconds": medians,
        "tokens_per_second": {name: 1e3 * tokens / value for name, value in medians.items()},
        "over_adapter": {
            name: statistics.median(map(truediv, each.milliseconds, without))
            for name, each in taken.items()
        },
        "mixture_milliseconds": {
            name: statistics.median(map(sub, each.milliseconds, without))
            for name, each in taken.items()
        },
        "flops": needed,
        "tflops_per_second": rates,
        "held_bytes": {name: each.held_bytes for name, each in taken.items()},
        "peak_bytes": {name: each.peak_bytes for name, each in taken.items()},
    }
    if bench.chip is not None:
        most = CHIPS[bench.chip].flops / 1e12
        result["share_of_chip"] = {name: rate / most for name, rate in rates.items()}
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    peaks, held = result["peak_bytes"], result["held_bytes"]
    shares = result.get("share_of_chip", {})
    lines = [
        f"{result['size']}: {result['batch']} x ({PROMPT_TOKENS} + {result['source']} -> {result['target']}) tokens,"
        f" {result['dtype']} on {result['device']} ({result['threads']} threads), medians of {result['rounds']} rounds;"
        f" {result['experts']} experts of rank {result['rank']} on {', '.join(result['sites'])}",
        "            step ms   x adapter   mixture ms   tokens/s   TFLOP/s   peak MB   over adapter MB   total MB",
    ]
    for name in peaks:
        share = f"   {100 * shares[name]:.1f} % of {result['chip']}" if shares else ""
        lines.append(
            f"  {name:<8}{result['milliseconds'][name]:10.1f}{result['over_adapter'][name]:11.3f}"
            f"{result['mixture_milliseconds'][name]:13.1f}{result['tokens_per_second'][name]:11.0f}"
            f"{result['tflops_per_second'][name]:10.3f}{peaks[name] / 1e6:10.1f}"
            f"{(peaks[name] - peaks['adapter']) / 1e6:15.1f}{(held[name] + peaks[name]) / 1e6:14.1f}{share}"
        )
    return "\n".join(lines)
