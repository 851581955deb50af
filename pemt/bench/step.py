"""`pemt bench step`: a whole training step of stage 2, with the experts mixed in three ways and without any.

B batch, S tokens, F d_ff, D d_model, K experts, R rank.

    adapter  the same model without experts: target adapter, prompt and layer norms alone
    loop     a loop over the K experts (`pemt.ops.reference`), by autograd
    packed   few matrix products in plain PyTorch
    fused    the compiled kernels

A random T5 of the named size, K random experts, random tokens; forward, backward and AdamW. All
variants run in every round, in turn; what the mixture costs is the median of the rounds' differences
to `adapter`. Memory is the peak of one step above the model at rest.
"""

from __future__ import annotations

import ctypes
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from pemt.bench.op import ADAPTER_REDUCTION, EXPERTS, RANK, forced, time_once
from pemt.command_line import Parser, command_parser
from pemt.config import AdapterConfig, MixtureConfig
from pemt.model import ExpertSource, PemtT5, base_shape
from pemt.model.experts import expert_shapes
from pemt.model.mixture import MIXTURES, LoraMixture
from pemt.ops import reference

# num_layers, d_model, d_ff, num_heads, d_kv, feed_forward_proj: the published configurations
SIZES = {
    "t5-small": (6, 512, 2048, 8, 64, "relu"),
    "t5-base": (12, 768, 3072, 12, 64, "relu"),
    "t5-large": (24, 1024, 4096, 16, 64, "relu"),
    "t5-3b": (24, 1024, 16384, 32, 128, "relu"),
    "flan-t5-xl": (24, 2048, 5120, 32, 64, "gated-gelu"),
}
VARIANTS = ("adapter", "loop", "packed", "fused")
PROMPT_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """What to measure.

    Args:
        size: a name in SIZES.
        batch: examples; source, target: tokens of each.
        device: cpu or cuda; dtype: a name in torch.
        rounds: how often every variant is timed.
    """

    size: str = "t5-small"
    batch: int = 8
    source: int = 128
    target: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    rounds: int = 20


class LoopMixture(LoraMixture):
    """The experts one after another, and once more for the cosines: what `pemt.ops` is held against."""

    def mix(self, x_BSF: Tensor, gates_BK: Tensor) -> tuple[Tensor, Tensor]:
        return reference.expert_mixture(
            x_BSF, self.weight, self.down, self.up, gates_BK, self.scales, self.ranks
        )

    def sparsity(
        self, z_BSD: Tensor, kept: Tensor, gates_BK: Tensor, mask_BS: Tensor | None
    ) -> Tensor:
        weights_BS = None if mask_BS is None else mask_BS / mask_BS.sum().clamp(min=1)
        return reference.task_sparsity(
            z_BSD, kept, self.up, gates_BK, self.scales, self.ranks, weights_BS
        )


class Step:
    """One variant's model, optimizer and batch; calling it takes one training step."""

    def __init__(self, bench: StepBench, variant: str) -> None:
        self.implementation = {"packed": "packed", "fused": bench.device}.get(variant)
        self.model = build_model(bench, variant)
        trained = [parameter for _, parameter in self.model.trainable_parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        torch.manual_seed(0)
        draw = partial(torch.randint, 2, 32_000, device=bench.device)
        self.batch = {
            "input_ids": draw((bench.batch, bench.source)),
            "attention_mask": torch.ones(bench.batch, bench.source, device=bench.device).long(),
            "labels": draw((bench.batch, bench.target)),
        }

    def __call__(self) -> float:
        """The loss before the step."""
        if self.implementation is None:
            return self._step()
        with forced(self.implementation):
            return self._step()

    def _step(self) -> float:
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def plain_base(bench: StepBench) -> T5ForConditionalGeneration:
    """A random T5 of this size; always the same weights."""
    layers, d_model, d_ff, heads, d_kv, projection = SIZES[bench.size]
    shape: dict[str, Any] = {
        "num_layers": layers, "d_model": d_model, "d_ff": d_ff, "num_heads": heads, "d_kv": d_kv,
        "feed_forward_proj": projection, "vocab_size": 32_128, "decoder_start_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    with torch.device(bench.device):
        return T5ForConditionalGeneration(T5Config(**shape)).to(getattr(torch, bench.dtype))


def build_model(bench: StepBench, variant: str) -> PemtT5:
    """A stage-2 model of this size; the same weights for every variant."""
    base = plain_base(bench)
    with torch.device(bench.device):
        sources = [] if variant == "adapter" else random_sources(base_shape(base.config))
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


def random_sources(shape: dict[str, Any]) -> list[ExpertSource]:
    """K LoRA experts whose outputs are about as large as those of trained ones."""
    shapes = expert_shapes("lora", RANK, shape)
    return [
        ExpertSource(
            name=f"source-{k}",
            kind="lora",
            rank=RANK,
            alpha=RANK,
            weights={key: torch.randn(size) * size[1] ** -0.5 for key, size in shapes.items()},
            prompt_PD=torch.randn(PROMPT_TOKENS, shape["d_model"]),
        )
        for k in range(EXPERTS)
    ]


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that a call takes above what is held before it.

    On a CPU the process's resident memory: the kernel's own high-water mark, set back before the
    call (Linux), after the C library has returned what it keeps for later.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def measure(bench: StepBench) -> dict[str, Any]:
    """Times all variants in turn and measures each one's peak memory."""
    steps = {variant: Step(bench, variant) for variant in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses = {}
    for name, step in steps.items():  # warm-up; builds kernels and moments
        torch.manual_seed(1)  # the same dropout for all
        losses[name] = step()
    for number in range(bench.rounds):
        turn = number % len(VARIANTS)  # no variant always follows the same other
        for name in VARIANTS[turn:] + VARIANTS[:turn]:
            times[name].append(time_once(steps[name], bench.device))
    memory = {name: peak_bytes(step, bench.device) for name, step in steps.items()}
    tokens = bench.batch * (bench.source + PROMPT_TOKENS + bench.target)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = {name: list(zip(times[name], times["adapter"], strict=True)) for name in VARIANTS}
    return {
        **asdict(bench),
        "threads": torch.get_num_threads(),
        "first_loss": losses,
        "milliseconds": medians,
        "tokens_per_second": {name: 1e3 * tokens / value for name, value in medians.items()},
        "over_adapter": {
            name: statistics.median(ours / without for ours, without in pair)
            for name, pair in pairs.items()
        },
        "mixture_milliseconds": {
            name: statistics.median(ours - without for ours, without in pair)
            for name, pair in pairs.items()
        },
        "peak_bytes": memory,
    }


def make_parser() -> Parser:
    """The command line of `pemt bench step`."""
    parser = command_parser("bench step", __doc__, "pemt bench step --size t5-base --rounds 10")
    parser.add_argument("--size", choices=list(SIZES), default=StepBench.size)
    for name in ("batch", "source", "target", "rounds"):
        parser.add_argument(f"--{name}", type=int, default=getattr(StepBench, name))
    parser.add_argument("--device", choices=["cpu", "cuda"], default=StepBench.device)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=StepBench.dtype)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def run(*, threads: int, json: bool, **options: Any) -> None:
    """Measure and print; the options are those of `make_parser`."""
    torch.set_num_threads(threads)
    result = measure(StepBench(**options))
    print(dumps(result) if json else table(result))


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    adapter = result["peak_bytes"]["adapter"]
    lines = [
        f"{result['size']}: {result['batch']} x ({PROMPT_TOKENS} + {result['source']} -> {result['target']}) tokens,"
        f" {result['dtype']} on {result['device']} ({result['threads']} threads), medians of {result['rounds']} rounds",
        "            step ms   x adapter   mixture ms   tokens/s   peak MB   over adapter MB",
    ]
    for name in VARIANTS:
        peak = result["peak_bytes"][name]
        lines.append(
            f"  {name:<8}{result['milliseconds'][name]:10.1f}{result['over_adapter'][name]:11.3f}"
            f"{result['mixture_milliseconds'][name]:13.1f}{result['tokens_per_second'][name]:11.0f}"
            f"{peak / 1e6:10.1f}{(peak - adapter) / 1e6:15.1f}"
        )
    return "\n".join(lines)
