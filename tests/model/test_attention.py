"""Attention's bias and mask are added once per stack and pass; the numbers are transformers' own."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor

from pemt.model import FullT5, PemtT5
from pemt.model.attention import NAME, _sum
from tests.support.tiny_t5 import (
    OLD_ATTENTION,
    SIZES,
    gradients,
    target_model,
    tiny_base,
    tiny_batch,
)

Model = TypeVar("Model", PemtT5, FullT5)
LAYERS = SIZES["num_layers"] + 2 * SIZES["num_decoder_layers"]  # with attention: self and cross
STACKS = 3  # sums: encoder, decoder, cross-attention


def stock(model: Model) -> Model:
    """The same with the attention that transformers chose."""
    model.base.set_attn_implementation("sdpa")
    return model


def saved_sums(model: PemtT5) -> tuple[int, int]:
    """How many sums of bias and mask are kept for the backward pass of a step, and their bytes; each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and not tensor.requires_grad:  # queries, keys and values do
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**tiny_batch()).loss
    loss.backward()
    return len(kept), sum(kept.values())


by_interface = pytest.mark.skipif(
    OLD_ATTENTION, reason="this transformers' T5 adds bias and mask itself, and keeps its sums"
)


@by_interface
def test_one_sum_for_all_layers_of_a_stack() -> None:
    sums, saved = saved_sums(target_model().train())
    stock_sums, stock_saved = saved_sums(stock(target_model()).train())
    assert (sums, stock_sums) == (STACKS, LAYERS)
    batch, encoder, decoder = 3, 7 + 5, 4
    # nothing is masked in the decoder but what is to come, for all samples alike
    each = [batch * encoder * encoder, decoder * decoder, batch * decoder * encoder]
    depths = (SIZES["num_layers"], *[SIZES["num_decoder_layers"]] * 2)
    assert saved == 4 * SIZES["num_heads"] * sum(each)
    assert stock_saved == 4 * SIZES["num_heads"] * sum(
        size * depth for size, depth in zip(each, depths, strict=True)
    )


@by_interface
@pytest.mark.parametrize("family", ["t5", "t5-v1.1", "mt5", "umt5"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_numbers_are_transformers_own(
    family: str, checkpointed: bool, dtype: torch.dtype
) -> None:
    """Recomputed they are those that are kept: there transformers' bias of zeros would want a gradient, which takes
    another kernel."""
    losses, found, answers = [], [], []
    batch = tiny_batch()
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for change in (lambda model: model, stock):
        model = change(target_model(base=tiny_base(family)).to(dtype))
        answers.append(model.generate(**given, num_beams=2, max_new_tokens=4))
        if checkpointed and change is not stock:
            model.enable_gradient_checkpointing()
        loss = model.train()(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        found.append(gradients(model))
    assert torch.equal(*losses)
    assert torch.equal(*answers)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_trained_bias_has_its_gradient() -> None:
    ours, theirs = FullT5(tiny_base()).train(), stock(FullT5(tiny_base())).train()
    for model in (ours, theirs):
        model(**tiny_batch()).loss.backward()
    expected = gradients(theirs)
    assert any("relative_attention_bias" in name for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(ours).items())


def test_a_mask_of_another_pass_is_not_taken_for_this_ones() -> None:
    """The bias of a pass lives no longer than it; and where one would, its sum belongs to one mask."""
    model = target_model()
    for lengths in [(7, 4, 2), (3, 7, 7), (7, 4, 2)]:
        batch = tiny_batch(lengths)
        with torch.no_grad():
            shared = model(**batch).logits
            assert torch.equal(shared, stock(model)(**batch).logits)
        model.base.set_attn_implementation(NAME)


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_another_attention_by_choice_is_kept(chosen: str) -> None:
    base = tiny_base()
    base.set_attn_implementation(chosen)
    model = target_model(base=base)
    assert model.base.config._attn_implementation == {"eager": "eager", "sdpa": NAME}[chosen]
    assert NAME not in str(model.base.config.to_dict()), "a saved model would name it"


def test_a_sum_of_one_dtype_is_not_taken_for_another() -> None:
    """fp32's least number is no bf16: cast to it, a row that is masked whole would become NaN."""
    bias, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[[True, False], [True, True]]]])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert _sum(bias, mask, False, dtype).min() == torch.finfo(dtype).min
