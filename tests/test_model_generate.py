"""Generation: prompt, gates and cache agree with teacher forcing; padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pemt.model import PemtT5
from tests.tiny_t5 import (
    source_model,
    target_model,
    tiny_base,
    tiny_batch,
    tiny_sources,
)

LENGTHS = (7, 4, 2)


def _inputs(extra_padding: int = 0) -> dict[str, Tensor]:
    batch = tiny_batch(LENGTHS, extra_padding=extra_padding)
    del batch["labels"]
    return batch


MODELS: dict[str, Callable[[], PemtT5]] = {
    "target t5": target_model,
    "target t5-v1.1": lambda: target_model(base=tiny_base("t5-v1.1")),
    "target mt5": lambda: target_model(base=tiny_base("mt5")),
    "target umt5": lambda: target_model(base=tiny_base("umt5")),
    "target bottleneck": lambda: target_model(tiny_sources("bottleneck")),
    "adapter alone": lambda: target_model([]),
    "source": source_model,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_and_batch_change_nothing(name: str, beams: int) -> None:
    model = MODELS[name]()
    fixed = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6}
    together = model.generate(**_inputs(extra_padding=5), **fixed)
    for row, length in enumerate(LENGTHS):
        alone = {key: value[row : row + 1, :length] for key, value in _inputs().items()}
        assert torch.equal(model.generate(**alone, **fixed)[0], together[row])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_likeliest_of_the_forward_pass(name: str) -> None:
    model = MODELS[name]()
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": None}
    ids = model.generate(**_inputs(), **fixed)[:, 1:]
    with torch.no_grad():
        logits = model(**_inputs(), labels=ids).logits
    assert torch.equal(logits.argmax(-1), ids)


def test_several_sequences_from_beams() -> None:
    model = target_model()
    ids = model.generate(**_inputs(), num_beams=4, num_return_sequences=2, max_new_tokens=5)
    assert ids.shape[0] == 2 * len(LENGTHS)


def test_generation_leaves_training_as_it_was() -> None:
    """Between a forward pass and its backward, a validation may run."""
    models = [target_model().train() for _ in range(2)]
    for model in models:
        model.enable_gradient_checkpointing()
    losses = [model(**tiny_batch()).loss for model in models]
    models[1].eval()
    models[1].generate(**_inputs(), num_beams=2, max_new_tokens=3)
    models[1].train()
    for loss in losses:
        loss.backward()
    for (_, one), (_, other) in zip(
        models[0].trainable_parameters(), models[1].trainable_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad)


def test_no_sparsity_loss_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("generation needs no sparsity loss")

    monkeypatch.setattr("pemt.model.mixture.task_sparsity", refuse)
    model = target_model()
    model.generate(**_inputs(), max_new_tokens=3)
    with pytest.raises(AssertionError, match="no sparsity loss"):
        model(**tiny_batch())
