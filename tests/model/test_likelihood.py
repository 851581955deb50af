"""How likely each label is: the numbers of a whole pass with that label, from one pass of the encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from pemt.model import BitFitT5, FullT5, PeftT5, TrainedT5, peft_settings
from tests.support.tiny_t5 import source_model, target_model, tiny_base, tiny_batch, tiny_sources

LABELS = [[5, 1], [6, 7, 8, 1], [9, 10, 1]]


def peft(method: str, family: str = "t5", **given: Any) -> PeftT5:
    pytest.importorskip("peft")
    torch.manual_seed(3)
    model = PeftT5(tiny_base(family), peft_settings(method, given))
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS = {
    "target": target_model,
    "bottleneck": lambda: target_model(tiny_sources("bottleneck")),
    "source": source_model,
    "full": lambda: FullT5(tiny_base()),
    "bitfit": lambda: BitFitT5(tiny_base()),
    "lora": lambda: peft("lora"),
    "prompt": lambda: peft("prompt", num_virtual_tokens=4),
    "target t5gemma": lambda: target_model(base=tiny_base("t5gemma")),
    "full t5gemma": lambda: FullT5(tiny_base("t5gemma")),
    "bitfit t5gemma": lambda: BitFitT5(tiny_base("t5gemma")),
    "lora t5gemma": lambda: peft("lora", "t5gemma"),
    "prompt t5gemma": lambda: peft("prompt", "t5gemma", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_label_has_the_likelihood_of_a_pass_with_it(name: str) -> None:
    model: TrainedT5 = MODELS[name]().eval()
    batch = tiny_batch()
    inputs = batch["input_ids"], batch["attention_mask"]
    passes: list[int] = []
    model.base.get_encoder().register_forward_hook(lambda *_: passes.append(1))
    likely_BC, gates_BLK = model.label_log_likelihoods(*inputs, LABELS)
    # peft puts a prompt before the encoder's input itself, in a pass of both
    assert len(passes) == (len(LABELS) if name.startswith("prompt") else 1)
    with torch.no_grad():
        for label, likely_B in zip(LABELS, likely_BC.T, strict=True):
            labels_BT = torch.tensor(label).expand(len(likely_B), -1)
            out = model(*inputs, labels_BT)
            summed_B = -cross_entropy(out.logits.transpose(1, 2), labels_BT, reduction="none").sum(
                dim=1
            )
            torch.testing.assert_close(likely_B, summed_B, rtol=1e-4, atol=1e-4)
    assert likely_BC.dtype == torch.float32
    assert (likely_BC < 0).all()
    if out.gates_BLK is None:
        assert gates_BLK is None
    else:
        assert gates_BLK is not None
        torch.testing.assert_close(gates_BLK, out.gates_BLK, rtol=1e-4, atol=1e-5)
