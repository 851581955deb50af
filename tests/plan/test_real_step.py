"""FLOPs, memory and parameters of the plan against a real step: experts on attention, and 64 of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration

from pemt.bank.entries import write_entry
from pemt.commands import COMMANDS
from pemt.config import AdapterConfig, MixtureConfig, PemtError
from pemt.model import PemtT5, base_shape
from pemt.model.mixture import LoraMixture
from pemt.ops import prompt_mean, reference
from pemt.ops.checks import MAX_EXPERTS
from pemt.plan import MOST_EXPERTS, Cluster, Job, Zero
from pemt.plan.activations import saved
from pemt.plan.count import weights
from pemt.plan.job import CHIPS
from pemt.plan.memory import memory
from pemt.plan.shapes import Shape, read_shape
from pemt.plan.speed import flops
from tests.launch.launched_plan import make_base, sources_of
from tests.plan.test_plan import PLACES, batch_of, kept_for_backward, model_of, placed, tiny_job
from tests.support.allocations import allocations

MANY = (16,) * 64
WIDE = Job(
    shape=Shape(
        vocab_size=2000, d_model=128, d_kv=32, d_ff=512, num_layers=3, num_decoder_layers=3, num_heads=4,
        gated=False, tied=True,
    ),
    ranks=(16,) * 6,
    prompt_tokens=8,
    source_prompt_tokens=24,
    batch=8,
    source=120,
    target=16,
    bytes_per_value=4,
)  # fmt: skip


def many(**changes: Any) -> Job:
    """64 sources on q and v, or elsewhere."""
    return replace(tiny_job("pemt", **changes), ranks=MANY, source_prompt_tokens=3 * len(MANY))


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification in the place of the ops, whose products torch's counter does not see."""

    def apart(stacked: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return *stacked.split([len(up), up.shape[1]]), up

    def output(
        x: Tensor, stacked: Tensor, up: Tensor, gate: Tensor, context: Tensor | int, *experts: Any,
        adapter: tuple[Tensor, ...] = (), sparsity: bool, token_weights: Tensor | None = None,
    ) -> Any:  # fmt: skip
        frozen = apart(stacked, up)
        read = prompt_mean(x, context) if isinstance(context, int) else context
        gates = reference.gates(read, gate)
        if not sparsity:
            return reference.expert_mixture(x, *frozen, gates, *experts)[0], None, gates.detach()
        mixed = reference.ffn_output(x, *frozen, gates, adapter, *experts, token_weights)
        return *mixed, gates.detach()

    monkeypatch.setattr("pemt.model.mixture.gated_output", output)


@pytest.mark.usefixtures("plain_products")
@pytest.mark.parametrize("places", ["q v", "everywhere", "different", "wo"])
@pytest.mark.parametrize("method", ["pemt", "source"])
def test_flops(method: str, places: str) -> None:
    job = tiny_job(method, gated=places == "everywhere")
    if places in PLACES:
        job = placed(job, places)
    check_flops(job)


@pytest.mark.usefixtures("plain_products")
def test_flops_of_64_sources() -> None:
    check_flops(placed(many(), "q v"))


def check_flops(job: Job) -> None:
    model = model_of(job)
    with FlopCounterMode(display=False) as counter:
        model(**batch_of(job)).loss.backward()
    assert flops(job) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("places", ["q v", "different"])
def test_64_sources_have_every_parameter_and_keep_what_is_planned(places: str) -> None:
    job = placed(many(), places)
    model = model_of(job)
    found = [(p.name, p.shape, p.role == "trained") for p in weights(job)]
    assert found == [(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    kept = kept_for_backward(model, lambda: model(**batch_of(job)))
    biases = 4 * job.batch * job.shape.num_heads * (16 * 16 + 7 * 7 + 7 * 16)
    assert saved(job, "cpu") - biases == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("places", ["wo", "q v", "everywhere", "64 on q v"])
def test_peak_of_a_pass_and_its_backward(places: str) -> None:
    job = replace(WIDE, shape=replace(WIDE.shape, gated=places == "everywhere"))
    if places == "64 on q v":
        job = replace(job, ranks=MANY, source_prompt_tokens=3 * len(MANY))
    if places != "wo":
        job = placed(job, places.removeprefix("64 on "))
    model, batch = model_of(job), batch_of(job)
    alone = Cluster(nodes=1, gpus_per_node=1, chip=CHIPS["h100-80"], backend="gloo")
    planned = memory(job, Zero(name="none", stage=0), alone)
    found = max(accumulate(allocations(lambda: model(**batch).loss.backward())))
    assert planned.activations + planned.gradients == pytest.approx(found, rel=0.15)


def test_a_bank_of_64_is_planned_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks above a layer's output width among them; the command against the model that such a bank makes."""
    base = T5ForConditionalGeneration.from_pretrained(make_base(tmp_path / "base"))
    shape = base_shape(base.config)
    of_base = read_shape(str(tmp_path / "base"))
    job = placed(Job(shape=of_base, ranks=MANY, source_prompt_tokens=3 * len(MANY)), "different")
    sources = sources_of(job, shape)
    for source in sources:
        write_entry(
            tmp_path / "bank", source, base={"name": "x", **shape}, description=None, metrics={}
        )
    command = ["--model_name_or_path", str(tmp_path / "base"), "--bank_dir", str(tmp_path / "bank")]
    COMMANDS["plan"]([*command, "--json"])
    found = json.loads(capsys.readouterr().out)["parameters"]
    model = PemtT5.target(
        base,
        sources=sources,
        mixture=MixtureConfig(),
        adapter=AdapterConfig(reduction_factor=4),
        prompt_PD=torch.randn(5, 16),
    )
    ours = [p.numel() for n, p in model.named_parameters() if n.endswith((".up", "sources"))]
    # the down projections are under each layer's own weight
    layers = [each for each in model.modules() if isinstance(each, LoraMixture)]
    ours += [sum(each.ranks) * each.weight.shape[1] for each in layers]
    assert found["expert"] == sum(ours)
    COMMANDS["plan"](command)
    assert "64 LoRA experts on q, v, o, k, wo, of rank 16" in capsys.readouterr().out


def test_more_than_can_be_mixed_are_refused() -> None:
    assert MOST_EXPERTS == MAX_EXPERTS
    command = ["--model_name_or_path", "google-t5/t5-small", "--expert_rank", "1", "--json"]
    with pytest.raises(PemtError, match=r"--num_experts: found 129 experts on a layer, .* 128"):
        COMMANDS["plan"]([*command, "--num_experts", "129"])
    COMMANDS["plan"]([*command, "--num_experts", "128"])
