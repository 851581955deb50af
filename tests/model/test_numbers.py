"""The parts by hand: prompt correlation, gates, masks, labels, precision, experts handed on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pemt.config.schema import MixtureConfig
from pemt.model import PemtT5
from pemt.model.experts import SourceProjection
from pemt.model.prompts import TaskPrompt
from tests.support.tiny_t5 import (
    ADAPTER,
    EXPERT,
    FFNS,
    MIXTURE,
    ffn_sites,
    randomised,
    source_model,
    sources_on_sites,
    target_model,
    tiny_base,
    tiny_batch,
    tiny_inputs,
    tiny_prompt,
    tiny_source,
    tiny_sources,
)


def test_prompt_correlation() -> None:
    target_PD = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    sources = [torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0], [1.0, 1.0]])]
    prompt = TaskPrompt(target_PD, sources=sources)
    expected = target_PD.clone()
    for row in range(2):
        for source_QD in sources:
            weights = [torch.exp(torch.dot(target_PD[row], token)) for token in source_QD]
            for weight, token in zip(weights, source_QD, strict=True):
                expected[row] += weight / sum(weights) * token
    torch.testing.assert_close(prompt(), expected)


def test_prompt_dropout_is_on_the_attention_and_in_training_alone() -> None:
    source_QD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    prompt = TaskPrompt(torch.zeros(1, 2), sources=[source_QD], dropout=0.5)
    torch.manual_seed(0)
    seen = {tuple(prompt()[0].tolist()) for _ in range(40)}
    assert seen == {(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)}  # each of two halves, doubled
    prompt.eval()
    assert prompt()[0].tolist() == [0.5, 0.5]


def test_gates_start_equal_and_follow_the_prompt_alone() -> None:
    model = PemtT5.target(
        tiny_base(), sources=tiny_sources(), mixture=MIXTURE, adapter=ADAPTER,
        prompt_PD=tiny_prompt(),
    ).eval()  # fmt: skip
    gates = model(**tiny_batch()).gates_BLK
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / 3))
    first_wo = randomised(model).base.encoder.block[0].layer[1].DenseReluDense.wo
    x_BSF = torch.randn(2, 9, 48)
    changed = x_BSF.clone()
    changed[:, 5:] += 1  # behind the 5 tokens of the prompt
    gates_BK = first_wo.gate(x_BSF[:, :5].mean(1))
    torch.testing.assert_close(first_wo._gates(changed), gates_BK)
    torch.testing.assert_close(first_wo.mix(changed, sparsity=False)[2], gates_BK)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_sparsity_over_real_tokens_does_not_see_padding(kind: str) -> None:
    def losses(over_padding: bool) -> list[torch.Tensor]:
        mixture = MixtureConfig(sparsity_over_padding=over_padding)
        model = target_model(tiny_sources(kind), mixture=mixture)
        return [model(**tiny_batch(extra_padding=extra)).sparsity_loss for extra in (0, 6)]

    torch.testing.assert_close(*losses(over_padding=False))
    with_padding = losses(over_padding=True)
    assert (with_padding[0] - with_padding[1]).abs() > 1e-4


@pytest.mark.parametrize("over_padding", [True, False])
def test_labels_that_count_for_nothing(over_padding: bool) -> None:
    mixture = MixtureConfig(sparsity_over_padding=over_padding)
    for model in (source_model(), target_model(mixture=mixture)):
        batch = tiny_batch()
        batch["labels"] = torch.full_like(batch["labels"], -100)
        out = model(**batch)
        assert out.ce_loss == 0
        out.loss.backward()
        assert all(p.grad.isfinite().all() for _, p in model.trainable_parameters())


def test_cross_entropy_is_the_stock_one() -> None:
    batch = tiny_batch()
    out = source_model()(**batch)
    expected = F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(out.ce_loss, expected)


def test_an_example_alone_gets_the_logits_it_gets_in_a_batch() -> None:
    model = target_model()
    batch = tiny_batch()
    together = model(**batch).logits
    for row in range(3):
        alone = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_an_exported_expert_computes_what_it_computed(kind: str) -> None:
    """One expert and an adapter that adds nothing: stage 2's FFN is stage 1's."""
    source = randomised(source_model(kind))
    exported = source.export_expert("rte")
    assert exported.kind == kind
    assert exported.rank == 4
    torch.testing.assert_close(exported.prompt_PD, source.prompt.prompt.detach())
    target = target_model([exported])
    x_BSF, ffn_input_BSD = torch.randn(2, 9, 48), torch.randn(2, 9, 16)
    target.context.encoder_prompt_BD = torch.randn(2, 16)
    for old, new in zip(ffn_sites(source.base), ffn_sites(target.base), strict=True):
        torch.nn.init.zeros_(new.module.adapter.up.weight)
        torch.nn.init.zeros_(new.module.adapter.up.bias)
        for projection in (old.module, new.module):
            projection.ffn_input_BSD = ffn_input_BSD
        torch.testing.assert_close(new.module(x_BSF), old.module(x_BSF))


def test_export_takes_the_given_weights_and_shares_no_memory() -> None:
    model = source_model()
    state = {name: torch.full_like(p, 2.0) for name, p in model.trainable_parameters()}
    exported = model.export_expert("rte", state=state)
    assert all((tensor == 2).all() for tensor in exported.weights.values())
    assert (exported.prompt_PD == 2).all()
    before = model.prompt.prompt.detach().clone()
    model.export_expert("rte").prompt_PD.zero_()
    assert torch.equal(model.prompt.prompt, before)


def test_experts_start_as_published() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    lora = SourceProjection(weight, EXPERT["lora"]).expert
    for factor in (lora.down, lora.up):  # Kaiming-uniform with a = √5 is ±1/√(inputs)
        bound = factor.shape[1] ** -0.5
        assert 0.9 * bound < factor.abs().max() <= bound
    bottleneck = SourceProjection(weight, EXPERT["bottleneck"]).expert
    assert bottleneck.down.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not bottleneck.up.bias.any()


SOURCES = {
    "lora": tiny_sources,
    "bottleneck": lambda: tiny_sources("bottleneck"),
    "sites": sources_on_sites,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_bfloat16_base(kind: str) -> None:
    exact = target_model(SOURCES[kind]())
    model = target_model(SOURCES[kind](), base=tiny_base().bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    out, expected = model(**tiny_batch()), exact(**tiny_batch())
    out.loss.backward()
    assert out.loss.dtype == out.ce_loss.dtype == out.gates_BLK.dtype == torch.float32
    torch.testing.assert_close(out.sparsity_loss, expected.sparsity_loss, rtol=0.02, atol=0)
    torch.testing.assert_close(out.ce_loss, expected.ce_loss, rtol=0.1, atol=0)
    assert all(p.grad.isfinite().all() for _, p in model.trainable_parameters())
    assert model.generate(**tiny_inputs(), num_beams=2, max_new_tokens=3).shape[0] == 3


@pytest.mark.parametrize("kind", SOURCES)
def test_autocast(kind: str) -> None:
    model = target_model(SOURCES[kind]())
    expected = model(**tiny_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**tiny_batch())
    out.loss.backward()
    assert out.loss.dtype == out.gates_BLK.dtype == torch.float32
    torch.testing.assert_close(out.sparsity_loss, expected.sparsity_loss, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for _, p in model.trainable_parameters())


def test_the_fp16_layout_of_transformers() -> None:
    """Loaded in fp16, T5 keeps `wo` in fp32: experts and adapters must follow `wo`."""
    base = tiny_base().half()
    for site in ffn_sites(base):
        site.module.float()
    model = target_model(base=base)
    out = model(**tiny_batch())
    assert out.loss.isfinite()
    assert model.base.encoder.block[0].layer[1].DenseReluDense.wo.up.dtype == torch.float32
    assert out.gates_BLK.shape[1] == FFNS


def test_one_source_with_a_single_token_prompt() -> None:
    out = target_model([tiny_source(prompt=1)])(**tiny_batch((1,)))
    torch.testing.assert_close(out.gates_BLK, torch.ones(1, FFNS, 1))
    assert out.loss.isfinite()
