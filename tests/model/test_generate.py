"""Generation: prompt, gates and cache agree with teacher forcing; padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pemt.model import PemtT5, mixture
from pemt.model.context import PassContext, SiteRecord
from tests.support.tiny_t5 import (
    LENGTHS,
    check_greedy,
    check_padding_and_batch_change_nothing,
    on_sites,
    source_model,
    target_model,
    tiny_base,
    tiny_batch,
    tiny_inputs,
    tiny_sources,
)

MODELS: dict[str, Callable[[], PemtT5]] = {
    "target t5": target_model,
    "target t5-v1.1": lambda: target_model(base=tiny_base("t5-v1.1")),
    "target mt5": lambda: target_model(base=tiny_base("mt5")),
    "target umt5": lambda: target_model(base=tiny_base("umt5")),
    "target t5gemma": lambda: target_model(base=tiny_base("t5gemma")),
    "target bottleneck": lambda: target_model(tiny_sources("bottleneck")),
    "target sites t5gemma": lambda: on_sites(tiny_base("t5gemma")),
    "target sites": lambda: on_sites(tiny_base()),
    "target sites umt5": lambda: on_sites(tiny_base("umt5")),
    "adapter alone": lambda: target_model([]),
    "source": source_model,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_and_batch_change_nothing(name: str, beams: int) -> None:
    check_padding_and_batch_change_nothing(MODELS[name](), beams)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_likeliest_of_the_forward_pass(name: str) -> None:
    check_greedy(MODELS[name]())


def test_several_sequences_from_beams() -> None:
    model = target_model()
    ids = model.generate(**tiny_inputs(), num_beams=4, num_return_sequences=2, max_new_tokens=5)
    assert ids.shape[0] == 2 * len(LENGTHS)


def test_generation_leaves_training_as_it_was() -> None:
    """Between a forward pass and its backward, a validation may run."""
    models = [target_model().train() for _ in range(2)]
    for model in models:
        model.enable_gradient_checkpointing()
    losses = [model(**tiny_batch()).loss for model in models]
    models[1].eval()
    models[1].generate(**tiny_inputs(), num_beams=2, max_new_tokens=3)
    models[1].train()
    for loss in losses:
        loss.backward()
    for (_, one), (_, other) in zip(
        models[0].trainable_parameters(), models[1].trainable_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad)


def test_no_sparsity_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixture.gated_output

    def refuse(*args: Any, sparsity: bool, **options: Any) -> Any:
        if sparsity:
            raise AssertionError("generation needs no sparsity loss")
        return plain(*args, sparsity=sparsity, **options)

    monkeypatch.setattr(mixture, "gated_output", refuse)
    model = target_model()
    model.generate(**tiny_inputs(), max_new_tokens=3)
    with pytest.raises(AssertionError, match="no sparsity loss"):
        model(**tiny_batch())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["target t5", "target t5gemma", "target bottleneck", "target sites", "target sites t5gemma"],
)
def test_the_gates_of_an_answer_are_those_of_a_forward_pass(name: str, beams: int) -> None:
    model = MODELS[name]()
    with torch.no_grad():
        expected = model(**tiny_batch()).gates_BLK
    tokens, gates = model.generate_with_gates(**tiny_inputs(), num_beams=beams, max_new_tokens=5)
    assert torch.equal(tokens, model.generate(**tiny_inputs(), num_beams=beams, max_new_tokens=5))
    torch.testing.assert_close(gates, expected, rtol=1e-6, atol=1e-7)
    assert (gates - gates[:1]).abs().max() > 1e-3, "the samples' gates must differ"
    assert target_model([]).generate_with_gates(**tiny_inputs(), max_new_tokens=2)[1] is None


def test_what_a_request_keeps_is_not_the_next_ones() -> None:
    """Same shape, another input: nothing of the first request's gates may be left."""
    model = target_model()
    first = {key: value[:1, :2] for key, value in tiny_inputs().items()}
    second = {**first, "input_ids": first["input_ids"].flip(1) + 1}
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6}
    alone = target_model().generate_with_gates(**second, **fixed)
    model.generate_with_gates(**first, **fixed)
    again = model.generate_with_gates(**second, **fixed)
    assert torch.equal(again[0], alone[0])
    assert torch.equal(again[1], alone[1])
    assert not torch.equal(model.generate_with_gates(**first, **fixed)[1], alone[1])


def test_a_step_of_an_answer_is_the_op() -> None:
    """The decoder's way around the op gives the op's values."""
    model = target_model()
    mixture = model.base.decoder.block[1].layer[-1].DenseReluDense.wo
    x_BSF = torch.randn(3, 1, mixture.weight.shape[1])
    mixture.context.encoder_prompt_BD = torch.randn(3, mixture.gate.weight.shape[0])
    with torch.no_grad():
        mixture.gate.weight.normal_()
        expected, _, gates_BK = mixture.mix(x_BSF, sparsity=False)
        found = mixture.adapter(mixture.generate_step(x_BSF, mixture.prepare_step(gates_BK)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gates_are_found_by_their_site_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if transformers called the layers of a block in another order."""
    model, batch = target_model().eval(), tiny_batch()
    expected_BLK = model(**batch).gates_BLK
    assert len(expected_BLK.unique()) > len(model.gate_sites)

    def record_in_front(self: PassContext, tag: str, *recorded: Any) -> None:
        earlier = [(key, self._records.pop(key)) for key in list(self._records)]
        self._records.update([(tag, SiteRecord(*recorded)), *earlier])

    monkeypatch.setattr(PassContext, "record", record_in_front)
    assert torch.equal(model(**batch).gates_BLK, expected_BLK)
