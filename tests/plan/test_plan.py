"""The planner's formulas against the models themselves, and its command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration

from pemt.bench.model import random_t5
from pemt.commands import COMMANDS
from pemt.config import AdapterConfig, ExpertConfig, MixtureConfig, PemtError
from pemt.model import FullT5, PemtT5, TrainedT5, base_shape
from pemt.model.sites import Site, target_sites
from pemt.plan import Cluster, Job, Zero, read_zero
from pemt.plan.activations import saved
from pemt.plan.advice import advise, fits, largest_batch
from pemt.plan.count import sizes, weights
from pemt.plan.gather import gathered
from pemt.plan.job import CHIPS
from pemt.plan.memory import memory
from pemt.plan.shapes import KNOWN, Shape, read_shape
from pemt.plan.speed import flops, step_time
from pemt.plan.traffic import per_step
from tests.conftest import ROOT
from tests.launch.launched_plan import make_base, sources_of
from tests.support.tiny_t5 import FAMILIES

CLUSTER = Cluster(nodes=4, gpus_per_node=8, chip=CHIPS["h100-80"])
TINY = Shape(
    vocab_size=96, d_model=32, d_kv=6, d_ff=80, num_layers=2, num_decoder_layers=3, num_heads=4,
    gated=False, tied=True,
)  # fmt: skip
RANKS = {"source": (4,)}
# Where experts are, by PEFT's names; one for each expert, the last for all that follow.
PLACES: dict[str, list[list[str] | str]] = {
    "q v": [["q", "v"]],
    "everywhere": ["all-linear"],
    "different": [["q", "v", "o"], r"decoder.*(wo|k)"],
}


def model_of(job: Job, base: Any = None) -> TrainedT5:
    """The model that a job plans."""
    base = random_t5(job.shape) if base is None else base
    if job.method == "full":
        return FullT5(base).train()
    prompt_PD = torch.randn(job.prompt_tokens, job.shape.d_model)
    if job.method == "source":
        expert = ExpertConfig(rank=job.ranks[0], target_modules=modules_of(job))
        return PemtT5.source(base, expert=expert, prompt_PD=prompt_PD).train()
    return PemtT5.target(
        base,
        sources=sources_of(job, base_shape(base.config)) if job.experts else [],
        mixture=MixtureConfig(
            train_layer_norms=job.train_layer_norms,
            gate="learned" if job.learned_gates else "uniform",
        ),
        adapter=AdapterConfig(reduction_factor=job.adapter_reduction),
        prompt_PD=prompt_PD,
    ).train()


def modules_of(job: Job) -> list[str]:
    """What the one expert of stage 1 is on."""
    shape = job.shape.base_shape
    names = [name for each in job.ranks_by_site for name in each]
    return [Site.from_name(name, shape).module for name in names] or ["wo"]


def placed(job: Job, places: str) -> Job:
    """The job with its experts elsewhere."""
    modules = PLACES[places]
    chosen = [modules[min(k, len(modules) - 1)] for k in range(len(job.ranks))]
    return replace(
        job,
        ranks_by_site=tuple(
            {site.name: rank for site in target_sites(each, job.shape.base_shape)}
            for each, rank in zip(chosen, job.ranks, strict=True)
        ),
    )


def tiny_job(method: Any, **changes: Any) -> Job:
    return Job(
        shape=replace(TINY, **changes),
        method=method,
        ranks=RANKS.get(method, (4, 20)),
        prompt_tokens=5,
        source_prompt_tokens=12,
        batch=3,
        source=11,
        target=7,
        bytes_per_value=4,
    )


def batch_of(job: Job) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(2, job.shape.vocab_size - 6, (job.batch, job.source)),
        "attention_mask": torch.ones(job.batch, job.source).long(),
        "labels": torch.randint(2, job.shape.vocab_size - 6, (job.batch, job.target)),
    }


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", ["pemt", "adapter", "source", "full"])
def test_every_parameter_and_buffer(method: str, gated: bool) -> None:
    job = tiny_job(method, gated=gated, tied=not gated)
    model = model_of(job)
    found = [(p.name, p.shape, p.role == "trained") for p in weights(job)]
    assert found == [(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    assert not list(model.buffers()), "memory that the plan does not count"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("method", ["pemt", "source"])
def test_every_parameter_of_experts_elsewhere(method: str, places: str, gated: bool) -> None:
    job = placed(tiny_job(method, gated=gated, tied=not gated), places)
    for each in (job, replace(job, learned_gates=False)):
        found = [(p.name, p.shape, p.role == "trained") for p in weights(each)]
        real = model_of(each).named_parameters()
        assert found == [(n, tuple(p.shape), p.requires_grad) for n, p in real]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("method", ["pemt", "source"])
def test_saved_activations_of_experts_elsewhere(
    method: str, places: str, dtype: torch.dtype
) -> None:
    job = placed(replace(tiny_job(method, gated=True), bytes_per_value=dtype.itemsize), places)
    model = model_of(job).to(dtype)
    kept = kept_for_backward(model, lambda: model(**batch_of(job)))
    biases = job.batch * job.shape.num_heads * dtype.itemsize * (16 * 16 + 7 * 7 + 7 * 16)
    assert saved(job, "cpu") - biases == pytest.approx(kept, rel=0.03)


# Published: the sizes that the model cards give, to the digits they give.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_shapes(name: str) -> None:
    shape = read_shape(f"google/{name}")
    with torch.device("meta"):
        base = random_t5(shape)
    total = sum(parameter.numel() for parameter in base.parameters())
    assert sum(sizes(weights(Job(shape=shape, method="full"))).values()) == total
    assert PUBLISHED.get(name, total) == total


def test_trained_at_flan_t5_xl() -> None:
    assert 26e6 < sizes(weights(Job(shape=KNOWN["flan-t5-xl"])))["trained"] < 27e6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_ones_own(family: str, tmp_path: Path) -> None:
    base = FAMILIES[family]()
    base.save_pretrained(tmp_path / "t5-small")  # a folder's name is no published model's
    job = Job(shape=read_shape(str(tmp_path / "t5-small")), method="full")
    found = [(weight.name, weight.shape) for weight in weights(job)]
    real = [(f"base.{n}", tuple(p.shape)) for n, p in base.named_parameters()]
    assert sorted(found) == sorted(real)
    assert family == "t5gemma" or found == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", ["pemt", "adapter", "source", "full"])
def test_saved_activations(method: str, gated: bool, dtype: torch.dtype) -> None:
    job = replace(tiny_job(method, gated=gated), bytes_per_value=dtype.itemsize)
    model = model_of(job).to(dtype)
    kept = kept_for_backward(model, lambda: model(**batch_of(job)))
    # Position biases are alive in the forward pass, but not kept.
    biases = job.batch * job.shape.num_heads * dtype.itemsize * (16 * 16 + 7 * 7 + 7 * 16)
    assert saved(job, "cpu") - biases == pytest.approx(kept, rel=0.03)


def kept_for_backward(model: torch.nn.Module, run: Callable[[], object]) -> int:
    held = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in held)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", ["adapter", "source", "full"])
def test_flops(method: str, gated: bool) -> None:
    job = tiny_job(method, gated=gated)
    model = model_of(job)
    with FlopCounterMode(display=False) as counter:
        model(**batch_of(job)).loss.backward()
    assert flops(job) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_what_the_mixture_adds_to_the_flops() -> None:
    """As many products as `pemt bench op` counts for its floor."""
    from pemt.bench.layer import EXPERTS, Floor, Layer, OpBench

    floor = Floor(Layer(OpBench(shape="t5-small", batch=2, tokens=16)))
    shape = KNOWN["t5-small"]
    job = Job(shape=shape, batch=2, source=12, prompt_tokens=4, target=16, ranks=(64,) * EXPERTS)
    layers = shape.num_layers + shape.num_decoder_layers
    per_layer = (flops(job) - flops(replace(job, method="adapter"))) / layers
    bare = 2 * 2 * 32 * (shape.d_ff * 512 + 3 * 512 * 32)  # wo and target adapter, both ways
    assert per_layer == pytest.approx(floor.flops - bare, rel=0.02)


class TestGathering:
    """ZeRO-3's rules, where their outcome is plain."""

    found = weights(Job(shape=KNOWN["t5-base"]))
    total = sum(weight.size for weight in found)

    def elements(self, **changes: Any) -> int:
        size = {weight.name: weight.size for weight in self.found}
        zero = replace(Zero(name="x", stage=3, persistence=0), **changes)
        return sum(size[name] for name in gathered(self.found, zero).names)

    def test_a_small_model_is_gathered_once(self) -> None:
        assert self.elements() == self.total

    def test_without_reuse_nearly_twice(self) -> None:
        again = self.elements(reuse_distance=0, prefetch=0)
        embedding = 32_128 * 768  # for the encoder, the decoder, and the head's two passes
        assert again == pytest.approx(2 * self.total + 2 * embedding, rel=0.01)

    def test_live_weights_stay_below_the_limit(self) -> None:
        zero = Zero(name="x", stage=3, reuse_distance=0, prefetch=10_000_000, max_live=60_000_000)
        embedding = 32_128 * 768  # what is needed now is gathered whatever the limit says
        assert gathered(self.found, zero).live < 60_000_000 + embedding

    def test_kept_weights_are_not_gathered(self) -> None:
        assert self.elements(persistence=10**9) == 0


def test_offload_moves_bytes_to_the_host() -> None:
    job = Job(shape=KNOWN["flan-t5-xl"])
    plain, offloaded, all_of_it = (
        memory(job, read_zero(ROOT / "ds_configs" / f"{name}.json"), CLUSTER)
        for name in ("zero2", "zero2_offload", "zero3_offload")
    )
    assert offloaded.total < plain.total
    assert (
        offloaded.host == plain.optimizer + plain.gradients - 4
    )  # the CPU Adam's step is no tensor
    assert all_of_it.weights == all_of_it.experts == 0 < all_of_it.host


def test_stage_two_sends_the_trained_alone() -> None:
    job = Job(shape=KNOWN["flan-t5-xl"])
    trained = 2 * sizes(weights(job))["trained"]
    zero = read_zero(ROOT / "ds_configs" / "zero2.json")
    reduced, updated = per_step(job, zero, CLUSTER)
    assert reduced.sent("nccl") == pytest.approx(trained * 2 * 31 / 32)
    assert updated.sent("nccl") == pytest.approx(trained * 31 / 32)
    four = per_step(replace(job, accumulation=4), zero, CLUSTER)
    assert four[0].sent("nccl") == 4 * reduced.sent("nccl")
    assert four[1] == updated
    assert per_step(job, zero, replace(CLUSTER, nodes=1, gpus_per_node=1))[0].sent("nccl") == 0


@pytest.mark.parametrize(("chip", "name"), [("h100-80", "zero2.json"), ("a10-24", "zero3.json")])
def test_advice(chip: str, name: str) -> None:
    """t5-11b's 22 GB do not fit 24 GB beside anything else."""
    job = Job(shape=KNOWN["t5-11b"], batch=1)
    cluster = replace(CLUSTER, chip=CHIPS[chip])
    given = read_zero(ROOT / "ds_configs" / "zero2.json")
    advice = advise(job, cluster, ROOT / "ds_configs", given)
    assert advice["name"] == name
    assert fits(job, read_zero(ROOT / "ds_configs" / name), cluster)
    most = largest_batch(job, given, cluster)
    assert fits(replace(job, batch=most), given, cluster) == (most > 0)
    assert not fits(replace(job, batch=most + 1), given, cluster)


def test_checkpointing_trades_memory_for_time() -> None:
    job, zero = Job(shape=KNOWN["t5-large"]), read_zero(ROOT / "ds_configs" / "zero2.json")
    again = replace(job, gradient_checkpointing=True)
    assert memory(again, zero, CLUSTER).activations < memory(job, zero, CLUSTER).activations / 5
    assert (
        1.3 < step_time(again, zero, CLUSTER).compute / step_time(job, zero, CLUSTER).compute < 1.6
    )


COMMAND = [
    *("--model_name_or_path", "google/flan-t5-xl", "--task", "superglue-cb"),
    *("--num_nodes", "4", "--gpus_per_node", "8", "--gpu", "h100-80"),
    *("--ds_config", "ds_configs/zero3.json", "--per_device_train_batch_size", "32"),
]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["plan"](COMMAND)
    out = capsys.readouterr().out
    for words in ("experts", "gradients", "masters and moments", "activations", "buffers",
                  "largest micro-batch", "all-gather: frozen weights", "FLOPs of a step",
                  "samples an hour", "a checkpoint", "a model, not a measurement"):  # fmt: skip
        assert words in out, words
    assert re.findall(r"^  (\d+) nodes? of 8", out, re.MULTILINE) == ["1", "2", "4", "8", "20"]
    assert "take zero2.json: it fits" in out


def test_as_json_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["plan"]([*COMMAND, "--json"])
    found = json.loads(capsys.readouterr().out)
    COMMANDS["plan"]([*COMMAND, "--json", "--gpu_memory_gb", "20", "--network_gbit_s", "3200"])
    other = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert not other["fits"]
    assert other["step_seconds"]["total"] < found["step_seconds"]["total"]
    assert found["sent_per_step"] == sum(each["sent"] for each in found["wire_per_step"])


def test_a_bank_gives_ranks_and_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pemt.bank.entries import write_entry

    base = T5ForConditionalGeneration.from_pretrained(make_base(tmp_path / "base"))
    shape = base_shape(base.config)
    job = Job(shape=TINY, ranks=(4, 8), source_prompt_tokens=6)
    for source in sources_of(job, shape):
        write_entry(
            tmp_path / "bank", source, base={"name": "x", **shape}, description=None, metrics={}
        )
    places = ["--model_name_or_path", str(tmp_path / "base"), "--bank_dir", str(tmp_path / "bank")]
    COMMANDS["plan"]([*places, "--json"])
    found = json.loads(capsys.readouterr().out)
    layers, d_model, d_ff = 4, 16, 33
    assert found["parameters"]["expert"] == layers * 12 * (d_ff + d_model) + 6 * d_model


def test_experts_elsewhere_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["plan"]([*COMMAND, "--json"])
    published = json.loads(capsys.readouterr().out)["parameters"]
    elsewhere = ["--expert_target_modules", "q", "v", "--expert_rank", "16"]
    COMMANDS["plan"]([*COMMAND, *elsewhere, "--json"])
    found = json.loads(capsys.readouterr().out)["parameters"]
    attentions, width, experts = 24 + 2 * 24, 2048, 6
    prompts = published["expert"] - 48 * experts * 64 * (5120 + 2048)
    assert found["expert"] == attentions * 2 * experts * 16 * 2 * width + prompts
    COMMANDS["plan"]([*COMMAND, *elsewhere, "--gate", "uniform", "--json"])
    uniform = json.loads(capsys.readouterr().out)["parameters"]
    assert found["trained"] - uniform["trained"] == attentions * 2 * experts * width
    COMMANDS["plan"]([*COMMAND, *elsewhere])
    assert "6 LoRA experts on q, v, of rank 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h200"], "invalid choice: 'h200'"),
        (["--num_nodes", "0"], "--num_nodes: found 0, at least 1"),
        (["--efficiency", "0"], "--efficiency: found 0.0, it must be above 0"),
        (
            ["--adapter_reduction_factor", "4096"],
            "allowed is at most this base model's d_model, 2048",
        ),
        (["--ds_config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path: `./nowhere` cannot be loaded"),
        (["--task_name", "mnl"], "mnl"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(PemtError, match=re.escape(message)) as raised:
        COMMANDS["plan"]([*COMMAND, *arguments])
    assert "\n" not in str(raised.value)
