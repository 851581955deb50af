"""Every family, stage and kind of expert runs, trains what it should and generates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pemt.config.schema import MixtureConfig
from pemt.model import PemtT5
from tests.support.tiny_t5 import (
    FAMILIES,
    FFNS,
    gradients,
    on_sites,
    source_model,
    target_model,
    tiny_base,
    tiny_batch,
    tiny_source,
    tiny_sources,
)

MODELS = {
    "source lora": lambda base: source_model("lora", base),
    "source bottleneck": lambda base: source_model("bottleneck", base),
    "target lora": lambda base: target_model(tiny_sources("lora"), base),
    "target bottleneck": lambda base: target_model(tiny_sources("bottleneck"), base),
    "source everywhere": lambda base: source_model("everywhere", base),
    "target sites": on_sites,
    "target one expert": lambda base: target_model([tiny_source()], base),
    "adapter alone": lambda base: target_model([], base),
}


def is_alone(model: PemtT5, parameter: str) -> bool:
    """Whether a gate has a single source."""
    return len(model.get_submodule(parameter.removesuffix(".gate.weight")).source_names) == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", MODELS)
def test_forward_backward_generate(family: str, kind: str) -> None:
    model = MODELS[kind](tiny_base(family))
    batch = tiny_batch()
    out = model(**batch)
    assert out.logits.shape == (3, 4, 64)
    assert out.encoder_last_hidden_state.shape == (3, 5 + 7, 16)
    out.loss.backward()
    for name, grad in gradients(model).items():
        # the gate over one expert is 1 whatever its weight
        without_effect = name.endswith("gate.weight") and is_alone(model, name)
        assert grad.isfinite().all()
        assert grad.any() != without_effect, name
    assert not [n for n, p in model.named_parameters() if p.grad is not None]
    del batch["labels"]
    for beams in (1, 2):
        ids = model.generate(**batch, num_beams=beams, max_new_tokens=4, min_new_tokens=4)
        assert ids.shape == (3, 5)


def test_outputs_with_and_without_experts() -> None:
    with_experts, alone, source = target_model(), target_model([]), source_model()
    out = with_experts(**tiny_batch())
    assert out.gates_BLK.shape == (3, FFNS, 3)
    assert out.gates_BLK.dtype == torch.float32
    assert not out.gates_BLK.requires_grad
    torch.testing.assert_close(out.gates_BLK.sum(-1), torch.ones(3, FFNS))
    torch.testing.assert_close(out.loss, out.ce_loss + 0.1 * out.sparsity_loss)
    for model in (alone, source):
        out = model(**tiny_batch())
        assert out.gates_BLK is None
        assert out.sparsity_loss is None
        torch.testing.assert_close(out.loss, out.ce_loss)


LORA = {"expert.down", "expert.up"}
ADAPTER = {
    "adapter.down.weight",
    "adapter.down.bias",
    "adapter.up.weight",
    "adapter.up.bias",
}
BOTTLENECK = {name.replace("adapter", "expert") for name in ADAPTER}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "in_wo", "norms"),
    [
        ("source lora", LORA, False),
        ("source bottleneck", BOTTLENECK, False),
        ("target lora", ADAPTER | {"gate.weight"}, True),
        ("target bottleneck", ADAPTER | {"gate.weight"}, True),
        ("adapter alone", ADAPTER, True),
    ],
)
def test_exactly_this_is_trained(family: str, kind: str, in_wo: set[str], norms: bool) -> None:
    model = MODELS[kind](tiny_base(family))
    outputs, all_norms = t5gemma_names() if family == "t5gemma" else t5_names()
    expected = {"prompt.prompt", *(f"base.{wo}.{name}" for wo in outputs for name in in_wo)}
    if norms:
        expected |= {f"base.{norm}.weight" for norm in all_norms}
    assert {name for name, _ in model.trainable_parameters()} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


def t5_names() -> tuple[list[str], list[str]]:
    """The FFNs' output projections and the layer norms."""
    outputs = [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(2)]
    outputs += [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(3)]
    norms = []
    for stack, layers, sublayers in (("encoder", 2, 2), ("decoder", 3, 3)):
        norms.append(f"{stack}.final_layer_norm")
        norms += [
            f"{stack}.block.{i}.layer.{j}.layer_norm"
            for i in range(layers)
            for j in range(sublayers)
        ]
    return outputs, norms


def t5gemma_names() -> tuple[list[str], list[str]]:
    """As `t5_names`."""
    outputs, norms = [], []
    parts = {
        "encoder": ["self_attn", "feedforward"],
        "decoder": ["self_attn", "cross_attn", "feedforward"],
    }
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        norms.append(f"model.{stack}.norm")
        for i in range(layers):
            outputs.append(f"model.{stack}.layers.{i}.mlp.down_proj")
            norms += [
                f"model.{stack}.layers.{i}.{side}_{part}_layernorm"
                for part in parts[stack]
                for side in ("pre", "post")
            ]
    return outputs, norms


def test_layer_norms_can_stay_frozen() -> None:
    model = target_model(mixture=MixtureConfig(train_layer_norms=False))
    assert not [name for name, _ in model.trainable_parameters() if "layer_norm" in name]


def test_parameters_are_used_by_their_owners_alone() -> None:
    """ZeRO-3's contract: a parameter has its values only while its own module runs, or one that says it uses it."""
    expected = target_model()(**tiny_batch()).loss
    sites = [lambda family=family: on_sites(tiny_base(family)) for family in ("t5", "t5gemma")]
    for make in (target_model, lambda: target_model(tiny_sources("bottleneck")), *sites):
        model = make()
        whole = {id(parameter): parameter.data for parameter in model.parameters()}

        def used(module: nn.Module) -> list[nn.Parameter]:
            return [*module.parameters(recurse=False), *getattr(module, "external_parameters", ())]

        def gather(module: nn.Module, args: object, whole: dict = whole) -> None:
            for parameter in used(module):
                parameter.data = whole[id(parameter)]

        def release(module: nn.Module, args: object, output: object) -> None:
            for parameter in used(module):
                parameter.data = torch.full_like(parameter.data, float("nan"))

        for module in model.modules():
            release(module, (), None)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
        with torch.no_grad():
            loss = model(**tiny_batch()).loss
        assert loss.isfinite()
        if make is target_model:
            torch.testing.assert_close(loss, expected)
