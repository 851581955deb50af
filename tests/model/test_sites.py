"""Experts on any linear layer: names, the real `peft`'s values at every site, gradients, experts apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pemt.bank.peft_format import read_peft
from pemt.config import ConfigError, ExpertConfig, MixtureConfig
from pemt.model import ExpertSource, PemtT5, base_shape
from pemt.model.experts import ModelError
from pemt.model.inject import checked_base, linear_sites
from pemt.model.mixture import MIXTURES, LoraMixture
from pemt.model.sites import Site, sites_of, target_sites
from pemt.ops import reference
from tests.support.tiny_t5 import (
    ADAPTER,
    EXPERT,
    FAMILIES,
    MIXTURE,
    gradients,
    on_sites,
    source_model,
    sources_on_sites,
    target_model,
    tiny_base,
    tiny_batch,
    tiny_inputs,
    tiny_prompt,
    tiny_source,
)

SHAPE = base_shape(tiny_base().config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_are_the_linear_layers_of_the_blocks(family: str) -> None:
    base = tiny_base(family)
    shape = base_shape(base.config)
    found = {
        name: tuple(module.weight.shape)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("lm_head")
    }
    assert {site.module: site.widths(shape)[::-1] for site in sites_of(shape)} == found
    assert [Site.from_name(site.name, shape) for site in sites_of(shape)] == sites_of(shape)


def names(target_modules: Any) -> list[str]:
    return [site.name for site in target_sites(target_modules, SHAPE)]


def test_target_modules_are_read_as_peft_reads_them() -> None:
    several = (
        ["q", "v"],
        ["wo"],
        ["SelfAttention.k", "wi"],
        r".*EncDecAttention\.[ko]",
        "all-linear",
    )
    for target in several:
        config = peft.LoraConfig(target_modules=target, r=1, task_type="SEQ_2_SEQ_LM")
        theirs = peft.get_peft_model(tiny_base(), config).targeted_module_names
        assert [site.module for site in target_sites(target, SHAPE)] == theirs
    assert names(["wo"]) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2"]
    assert names(["encoder.block.1.layer.0.SelfAttention.q"]) == ["encoder.1.self.q"]
    assert names("decoder.*0.*EncDecAttention.k") == ["decoder.0.cross.k"]


def test_a_family_has_its_own_names_and_t5s(tmp_path: Path) -> None:
    shape = base_shape(tiny_base("t5gemma").config)

    def modules(target: Any) -> list[str]:
        return [site.module for site in target_sites(target, shape)]

    several = ["q_proj", "v_proj"], ["down_proj"], ["mlp.up_proj"], r".*cross_attn\.[ko]_proj"
    for target in (*several, "all-linear"):
        config = peft.LoraConfig(target_modules=target, r=1, task_type="SEQ_2_SEQ_LM")
        theirs = peft.get_peft_model(tiny_base("t5gemma"), config).targeted_module_names
        assert sorted(modules(target)) == sorted(theirs)
    assert modules(["wo"]) == modules(["down_proj"])
    assert modules(["q", "wi_0"]) == modules(["q_proj", "gate_proj"])
    assert [site.name for site in target_sites(["wo"], shape)] == names(["wo"])
    with pytest.raises(
        ConfigError, match=r"allowed are a list of q_proj, .*down_proj, q, .*wo, a regular"
    ):
        modules(["wi"])


@pytest.mark.parametrize(
    "target", [["q", "wi_0"], ["shared"], "q", "lm_head", [], "(", ["Attention.q"]]
)
def test_target_modules_that_are_nowhere(target: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"expert.target_modules: .*(allowed are a list of|as a list)"
    ) as raised:
        names(target)
    assert "\n" not in str(raised.value)


def as_source(base: Any, folder: Path, **settings: Any) -> tuple[Any, ExpertSource]:
    """A PEFT model with random factors, and its adapter as a source."""
    # UMT5's decoder sees what it is to predict in transformers 5.17, unless its base has been checked
    base = checked_base(base)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **settings)).eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    lora = read_peft(folder, base_shape(base.config))
    source = ExpertSource(
        name="peft", kind="lora", rank=lora.rank, alpha=lora.alpha, weights=lora.weights,
        prompt_PD=torch.randn(3, 16, generator=torch.Generator().manual_seed(6)),
    )  # fmt: skip
    return model, source


def mixed(source: ExpertSource, family: str) -> PemtT5:
    """Stage 2 with one expert, whose gate is 1, and target adapters that add nothing."""
    model = PemtT5.target(
        tiny_base(family), sources=[source], mixture=MIXTURE, adapter=ADAPTER, prompt_PD=tiny_prompt()
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "adapter.up" in name:
            nn.init.zeros_(parameter)
    return model


def difference(theirs: Any, ours: PemtT5, family: str) -> tuple[float, float]:
    """Of our logits from PEFT's, for each unit of the largest where that is above 1; and of PEFT's from the base's."""
    batch = tiny_batch()
    with torch.no_grad():
        start = {
            **ours.encoder_inputs(batch["input_ids"], batch["attention_mask"]),
            "decoder_input_ids": ours.base.prepare_decoder_input_ids_from_labels(batch["labels"]),
            "use_cache": False,  # with a cache T5Gemma's decoder sees padding
        }
        expected, plain = theirs(**start).logits, tiny_base(family)(**start).logits
        found = ours(**batch).logits
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    return float(error), float((expected - plain).abs().max())


SETTINGS: dict[str, dict[str, Any]] = {
    "q and v": {"r": 3, "lora_alpha": 6, "target_modules": ["q", "v"]},
    "everywhere": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "some layers": {
        "r": 4, "lora_alpha": 4, "target_modules": ["q", "wo"],
        "layers_to_transform": [1], "layers_pattern": "block",
    },
    "patterns, rank-stabilised": {
        "r": 2, "lora_alpha": 3, "target_modules": ["k", "o", "wo"], "use_rslora": True,
        "rank_pattern": {"k": 5, r"decoder.block.1.*\.o": 1}, "alpha_pattern": {"EncDecAttention.k": 7},
    },
}  # fmt: skip

# The same where modules have other names.
GEMMA_SETTINGS: dict[str, dict[str, Any]] = {
    "q and v": {**SETTINGS["q and v"], "target_modules": ["q_proj", "v_proj"]},
    "everywhere": SETTINGS["everywhere"],
    "some layers": {
        **SETTINGS["some layers"], "target_modules": ["q_proj", "down_proj"], "layers_pattern": "layers",
    },
    "patterns, rank-stabilised": {
        **SETTINGS["patterns, rank-stabilised"], "target_modules": ["k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"k_proj": 5, r"decoder.layers.1.*\.o_proj": 1}, "alpha_pattern": {"cross_attn.k_proj": 7},
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_one_expert_with_gate_one_is_peft(family: str, settings: str, tmp_path: Path) -> None:
    chosen = GEMMA_SETTINGS if family == "t5gemma" else SETTINGS
    theirs, source = as_source(tiny_base(family), tmp_path, **chosen[settings])
    error, effect = difference(theirs, mixed(source, family), family)
    assert effect > 0.01
    assert error < 1e-5


@pytest.mark.parametrize("family", ["t5-v1.1", "t5gemma"])
def test_each_site_alone_is_peft(family: str, tmp_path: Path) -> None:
    """Of one layer of each stack."""
    sites = [site for site in sites_of(base_shape(tiny_base(family).config)) if site.layer == 1]
    assert len(sites) == 4 + 3 + 4 + 4 + 3
    for number, site in enumerate(sites):
        settings = {"r": 3, "lora_alpha": 9, "target_modules": [site.module]}
        theirs, source = as_source(tiny_base(family), tmp_path / str(number), **settings)
        ours = mixed(source, family)
        assert list(ours.gate_sites) == [site.name.replace(".", "/")]
        error, effect = difference(theirs, ours, family)
        assert effect > 1e-4, site
        assert error < 1e-5, site


def test_gates_and_sources_by_site() -> None:
    model = on_sites(tiny_base())
    found = model.gate_sites
    assert list(found)[:6] == [
        "encoder/0/self/q", "encoder/0/self/k", "encoder/0/self/v", "encoder/0/self/o", "encoder/0/ffn/wi", "encoder/0",
    ]  # fmt: skip
    assert found["encoder/0"] == ["everywhere", "outputs"]
    assert found["encoder/1/self/q"] == ["everywhere", "attention"]
    assert found["encoder/1/self/o"] == ["everywhere"]
    assert found["decoder/2/cross/k"] == ["everywhere", "decoder"]
    gates_BLK = model(**tiny_batch()).gates_BLK
    torch.testing.assert_close(gates_BLK.sum(-1), torch.ones(3, len(found)))
    for (site, sources), gates_BK in zip(found.items(), gates_BLK.unbind(dim=1), strict=True):
        absent = [k for k, name in enumerate(model.source_names) if name not in sources]
        assert not gates_BK[:, absent].any()
        # the first layer's q, k and v read the prompt before it has seen anything
        follows = len(sources) > 1 and site not in {f"encoder/0/self/{each}" for each in "qkv"}
        assert (gates_BK.std(dim=0).max() > 1e-6) == follows, site


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_reads_its_input_in_the_encoder_and_the_encoder_in_the_decoder(family: str) -> None:
    model = on_sites(tiny_base(family))
    sites, inputs = linear_sites(model.base), {}
    for each in sites:
        each.module.register_forward_pre_hook(
            lambda module, args, name=each.name: inputs.update({name: args[0]})
        )
    output = model(**tiny_batch())
    for each, gates_BK in zip(sites, output.gates_BLK.unbind(dim=1), strict=True):
        in_decoder = each.name.startswith("decoder")
        read_BSC = output.encoder_last_hidden_state if in_decoder else inputs[each.name]
        columns = [model.source_names.index(name) for name in each.module.source_names]
        expected = torch.softmax(read_BSC[:, :5].mean(dim=1) @ each.module.gate.weight, dim=-1)
        torch.testing.assert_close(gates_BK[:, columns], expected, msg=each.name)


class PlainMixture(LoraMixture):
    """The specification of the op in the place of the op, differentiated by autograd."""

    def mix(self, x_BSF: Tensor, *, sparsity: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        prompt_BC = self.context.encoder_prompt_BD if self.in_decoder else x_BSF[:, :5].mean(dim=1)
        gates_BK = self.gate(prompt_BC)
        frozen, experts = (*self.weight.split(self.sizes), self.up), (self.scales, self.ranks)
        if not sparsity:
            y_BSD, _ = reference.expert_mixture(x_BSF, *frozen, gates_BK, *experts)
            return y_BSD, None, gates_BK
        mixed = reference.ffn_output(x_BSF, *frozen, gates_BK, self.adapter_tensors, *experts)
        return *mixed, gates_BK


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_specification(
    monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    # In float64 transformers gives NaN for a T5Gemma with padding.
    dtype, rtol, atol = (
        (torch.float32, 1e-3, 1e-4) if family == "t5gemma" else (torch.float64, 1e-5, 1e-7)
    )
    found = {}
    for name, kind in (("op", LoraMixture), ("specification", PlainMixture)):
        monkeypatch.setitem(MIXTURES, "lora", kind)
        model = on_sites(tiny_base(family).to(dtype))
        loss = model(**tiny_batch()).loss
        loss.backward()
        found[name] = loss.detach(), gradients(model)
    torch.testing.assert_close(found["op"], found["specification"], rtol=rtol, atol=atol)


def test_sixty_four_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rank 16 on q and v, half of them on v alone: gates, loss, gradients, answers by beams."""
    sources = [
        tiny_source(f"task{k}", rank=16, prompt=2, seed=k, target_modules=["q", "v"][k % 2 :])
        for k in range(64)
    ]
    weights = [{key: 0.1 * each for key, each in source.weights.items()} for source in sources]
    sources = [replace(s, weights=w) for s, w in zip(sources, weights, strict=True)]
    found = {}
    for name, kind in (("op", LoraMixture), ("specification", PlainMixture)):
        monkeypatch.setitem(MIXTURES, "lora", kind)
        model = target_model(sources)
        out = model(**tiny_batch())
        out.loss.backward()
        found[name] = out.loss.detach(), out.gates_BLK, gradients(model)
    torch.testing.assert_close(found["op"], found["specification"], rtol=1e-4, atol=1e-5)
    sites = model.gate_sites
    counts = {site.rpartition("/")[2]: len(present) for site, present in sites.items()}
    assert counts == {"q": 32, "v": 64}
    torch.testing.assert_close(found["op"][1].sum(-1), torch.ones(3, len(sites)))
    monkeypatch.setitem(MIXTURES, "lora", LoraMixture)
    tokens, gates = target_model(sources).generate_with_gates(
        **tiny_inputs(), num_beams=2, max_new_tokens=4
    )
    assert tokens.shape[0] == 3
    torch.testing.assert_close(gates, found["op"][1])


def test_more_experts_than_can_be_mixed_are_refused() -> None:
    source = tiny_source(rank=1, target_modules=["encoder.block.0.layer.0.SelfAttention.q"])
    many = [replace(source, name=f"task{k}") for k in range(129)]
    with pytest.raises(ModelError, match=r"found 129 experts on encoder.0.self.q, .* at most 128"):
        target_model(many)
    assert len(target_model(many[:128]).gate_sites) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradcheck_of_a_site(family: str) -> None:
    model = on_sites(tiny_base(family).double())
    modules = {each.name: each.module for each in linear_sites(model.base)}
    for name in ("encoder.1.self.q", "decoder.1.self.v"):
        site = modules[name]
        x = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
        prompt = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, prompt: Tensor, site: Any = site) -> Tensor:
            site.context.encoder_prompt_BD = prompt
            return site(x) if site.in_decoder else site(x) + 0 * prompt.sum()

        # the gate is in fp32, whatever the rest is
        assert torch.autograd.gradcheck(run, (x, prompt), eps=1e-3, atol=1e-3, rtol=1e-2)


def test_experts_on_no_ffn_have_no_sparsity_loss_and_ffns_their_adapter() -> None:
    model = target_model(
        [tiny_source("a", target_modules=["q", "v"]), tiny_source("b", target_modules=["q"])]
    )
    out = model(**tiny_batch())
    assert out.sparsity_loss is None
    torch.testing.assert_close(out.loss, out.ce_loss)
    trained = {name for name, _ in model.trainable_parameters()}
    assert "base.encoder.block.0.layer.1.DenseReluDense.wo.adapter.up.weight" in trained
    assert "base.encoder.block.0.layer.1.DenseReluDense.wo.gate.weight" not in trained
    out.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_expert_comes_back(family: str) -> None:
    config = ExpertConfig(rank=3, alpha=6.0, target_modules=["q", "k", "wo"])
    model = PemtT5.source(tiny_base(family), expert=config, prompt_PD=tiny_prompt()).eval()
    exported = model.export_expert("rte")
    exported.check(base_shape(model.base.config))
    assert {key.rpartition(".")[0] for key in exported.weights} == set(names(["q", "k", "wo"]))
    ours = mixed(exported, family)
    # stage 1 has no correlation of prompts
    ours.prompt.forward = lambda: model.prompt.prompt  # type: ignore[method-assign]
    torch.testing.assert_close(
        ours(**tiny_batch()).logits, model(**tiny_batch()).logits, rtol=1e-4, atol=1e-4
    )
    assert (
        source_model(base=tiny_base(family))(**tiny_batch()).logits - model(**tiny_batch()).logits
    ).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["t5", "t5gemma"])
def test_uniform_gates_are_equal_and_not_trained(family: str) -> None:
    mixture = MixtureConfig(prompt_dropout=0.0, gate="uniform")
    sources = sources_on_sites(family)
    model = target_model(sources, tiny_base(family), mixture=mixture)
    learned = target_model(sources, tiny_base(family))
    out = model(**tiny_batch())
    counts = torch.tensor([len(sources) for sources in model.gate_sites.values()])
    torch.testing.assert_close(out.gates_BLK.amax(dim=-1), (1 / counts).expand(3, -1))
    trained = {name for name, _ in model.trainable_parameters()}
    assert trained == {
        n for n, _ in learned.trainable_parameters() if not n.endswith("gate.weight")
    }
    out.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    with torch.no_grad():
        for name, parameter in learned.trainable_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
            else:
                parameter.copy_(dict(model.trainable_parameters())[name])
    torch.testing.assert_close(learned(**tiny_batch()).loss, out.loss)
    tokens, gates = model.generate_with_gates(**tiny_inputs(), max_new_tokens=4)
    assert torch.equal(tokens, learned.generate(**tiny_inputs(), max_new_tokens=4))
    torch.testing.assert_close(gates, out.gates_BLK)


def test_a_bottleneck_is_on_the_ffns_alone(tmp_path: Path) -> None:
    from tests.support.tiny import source_config

    expert = ExpertConfig(kind="bottleneck", target_modules=["q"])
    with pytest.raises(ConfigError, match=r"found \['q'\], a bottleneck expert is on \[wo\]"):
        source_config(tmp_path, tmp_path, tmp_path, tmp_path, "t", expert=expert)
    assert EXPERT["bottleneck"].target_modules == ["wo"]
