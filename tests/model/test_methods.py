"""The baselines' models: what each computes where the truth is known, what it trains, what it refuses."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModelForSeq2SeqLM
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from pemt.config import PemtError
from pemt.config.parse import read_yaml_mapping
from pemt.model import (
    PREFIXES,
    BitFitT5,
    FullT5,
    PeftT5,
    TrainedT5,
    peft_settings,
    starts_from_text,
)
from pemt.model.peft_model import UNFIT, PeftError
from pemt.run.early import check_method
from tests.support.tiny import adapt_config
from tests.support.tiny_t5 import (
    SIZES,
    check_greedy,
    check_padding_and_batch_change_nothing,
    gradients,
    tiny_base,
    tiny_batch,
    tiny_inputs,
    tiny_prompt,
)

VIRTUAL = 7


def lora(base: Any = None, **fields: Any) -> PeftT5:
    return PeftT5(base or tiny_base(), peft_settings("lora", fields))


def prompt(base: Any = None) -> PeftT5:
    settings = peft_settings("prompt", {"num_virtual_tokens": VIRTUAL})
    return PeftT5(base or tiny_base(), settings, prompt_PD=tiny_prompt())


def by_peft(**fields: Any) -> Callable[[], PeftT5]:
    return lambda: PeftT5(tiny_base(), peft_settings("peft", fields))


MODELS: dict[str, Callable[[], TrainedT5]] = {
    "full": lambda: FullT5(tiny_base()),
    "full umt5": lambda: FullT5(tiny_base("umt5")),
    "bitfit": lambda: BitFitT5(tiny_base()),
    "bitfit t5-v1.1": lambda: BitFitT5(tiny_base("t5-v1.1")),
    "lora": lora,
    "lora umt5": lambda: lora(tiny_base("umt5")),
    "lora on wo": lambda: lora(target_modules=["wo"]),
    "prompt": prompt,
    "prompt mt5": lambda: prompt(tiny_base("mt5")),
    "ia3": by_peft(peft_type="IA3"),
    "loha": by_peft(peft_type="LOHA"),
    "vera": by_peft(peft_type="VERA"),
    "ln tuning": by_peft(peft_type="LN_TUNING"),
    "p-tuning": by_peft(peft_type="P_TUNING", num_virtual_tokens=5),
}


def made(name: str) -> TrainedT5:
    """One of MODELS."""
    return with_effect(MODELS[name])


def with_effect(make: Callable[[], TrainedT5]) -> TrainedT5:
    """A model in evaluation mode with random trained matrices, so that each has an effect."""
    torch.manual_seed(7)
    model = make()
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits_of(base: Any, **encoder: Tensor) -> Tensor:
    """A bare T5's logits for the labels of `tiny_batch`."""
    decoder_input_ids = base.prepare_decoder_input_ids_from_labels(tiny_batch()["labels"])
    return base(**encoder, decoder_input_ids=decoder_input_ids).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_padding_and_batch_change_nothing(name: str, beams: int) -> None:
    check_padding_and_batch_change_nothing(made(name), beams)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_likeliest_of_the_forward_pass(name: str) -> None:
    check_greedy(made(name))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_changes_what_is_trained_and_nothing_else(name: str) -> None:
    check_step(made(name))


def check_step(model: TrainedT5) -> None:
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trained = dict(model.trainable_parameters())
    assert {key for key, value in model.named_parameters() if value.requires_grad} == set(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    out = model(**tiny_batch())
    assert out.gates_BLK is None
    assert out.sparsity_loss is None
    out.loss.backward()
    optimizer.step()
    changed = {
        key for key, value in model.named_parameters() if not torch.equal(value, before[key])
    }
    assert changed == set(trained)


TYPES = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
PREFIX = {"num_virtual_tokens": 4}
# What peft's defaults, or their absence, leave too large for the tiny base.
SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 8},
    "CARTRIDGE": PREFIX,
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "PREFIX_TUNING": PREFIX,
    "PROMPT_TUNING": PREFIX,
    "PSOFT": {"r": 4},
    "P_TUNING": PREFIX,
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5, 6, 7, 8]},
    "VBLORA": {"vector_length": 8, "num_vectors": 10},
    "WAVEFT": {"n_frequency": 20},
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_peft_trains_and_answers_or_is_refused_for_a_reason(kind: str) -> None:
    make = by_peft(peft_type=kind, **SMALL.get(kind, {}))
    if kind in UNFIT:
        with pytest.raises(PemtError, match=f"found {kind}, which .*; allowed are"):
            make()
        return
    model = with_effect(make)
    check_greedy(model)
    check_step(model)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_peft_says_in_one_line_what_does_not_fit(kind: str) -> None:
    told = complaint(by_peft(peft_type=kind))
    assert "\n" not in told
    assert not told or kind in told


def complaint(make: Callable[[], TrainedT5]) -> str:
    try:
        make()
    except PemtError as error:
        return str(error)
    return ""


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="an older peft has fewer")
def test_the_docs_name_every_type_of_peft() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    runs, refused = page.split("Types that run")[1].split("Types that are refused")
    refused = refused.split("CARTRIDGE and")[0]
    assert re.findall(r"[A-Z][A-Z_0-9]+", runs) == [kind for kind in TYPES if kind not in UNFIT]
    assert set(re.findall(r"[A-Z][A-Z_0-9]+", refused)) == set(UNFIT)


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_is_as_deep_and_as_wide_as_the_decoder(kind: str) -> None:
    """Not as the encoder is deep, nor as wide as the embeddings: heads need not divide d_model."""
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 5, "d_ff": 48, "num_heads": 2}
    config = T5Config(**sizes, num_layers=1, num_decoder_layers=3, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config)
    settings = peft_settings("peft", {"peft_type": kind, **PREFIX})
    check_greedy(with_effect(lambda: PeftT5(base, settings)))


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_that_answers_do_not_see_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As peft 0.21 beside transformers 5.24, which ignores the cache by its old name."""

    def dropped(self: PeftModelForSeq2SeqLM, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kwargs.pop("task_ids", None)
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)

    monkeypatch.setattr(PeftModelForSeq2SeqLM, "prepare_inputs_for_generation", dropped)
    settings = peft_settings("peft", {"peft_type": kind, **PREFIX})
    with pytest.raises(
        PeftError, match=f"{kind} cannot be .* its answers would lack the prefix: peft"
    ):
        PeftT5(tiny_base(), settings)


def test_a_prefix_and_recomputed_blocks_are_refused_together(tmp_path: Path) -> None:
    given = {"peft_type": "PREFIX_TUNING", **PREFIX}
    config = adapt_config(*(tmp_path,) * 4, "t", method="peft", peft_config=given)
    check_method(config)
    with pytest.raises(PemtError, match="gradient_checkpointing: does not go with PREFIX_TUNING"):
        check_method(replace(config, gradient_checkpointing=True))


@pytest.mark.parametrize("name", ["full", "bitfit", "lora", "prompt"])
def test_recomputing_blocks_changes_no_gradient(name: str) -> None:
    kept, recomputed = made(name), made(name)
    recomputed.enable_gradient_checkpointing()
    kept.train()(**tiny_batch()).loss.backward()
    recomputed.train()(**tiny_batch()).loss.backward()
    expected = gradients(kept)
    for key, gradient in gradients(recomputed).items():
        # Sums may be taken in another order, and what cancels in them is rounded as the largest value
        # is. A key's bias cancels altogether (softmax): hence a limit beside it.
        largest = expected[key].abs().max()
        assert (gradient - expected[key]).abs().max() <= 1e-5 * largest + 1e-7, key


def test_the_loss_is_the_cross_entropy_of_t5_itself() -> None:
    batch = tiny_batch()
    assert torch.allclose(FullT5(tiny_base())(**batch).loss, tiny_base()(**batch).loss)


def test_full_trains_everything_and_tied_weights_once() -> None:
    base = tiny_base()
    trained = dict(FullT5(base).trainable_parameters())
    assert {id(each) for each in trained.values()} == {id(each) for each in base.parameters()}
    assert len({id(each) for each in trained.values()}) == len(trained)
    assert "base.lm_head.weight" not in trained, "it is the embedding"


def test_bitfit_starts_as_the_base_and_has_the_published_number_of_biases() -> None:
    with torch.no_grad():
        ours = BitFitT5(tiny_base())(**tiny_batch()).logits
        assert torch.equal(ours, logits_of(tiny_base(), **tiny_inputs()))
    with torch.device("meta"):
        t5_base = T5ForConditionalGeneration(
            T5Config(
                d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12,
                decoder_start_token_id=0,
            )
        )  # fmt: skip
        biases = [each.numel() for _, each in BitFitT5(t5_base).trainable_parameters()]
    # 12 encoder and 12 decoder blocks, two last norms, and the head: published as 280K
    encoder, decoder = 12 * (4 * 768 + 3840 + 2 * 768), 12 * (8 * 768 + 3840 + 3 * 768)
    assert sum(biases) == encoder + decoder + 2 * 768 + 32128 == 282496


def test_a_bias_is_added_where_it_belongs() -> None:
    model = made("bitfit")
    ffn: Any = model.base.encoder.block[0].layer[1]
    x_BSD = torch.randn(2, 3, SIZES["d_model"])
    with torch.no_grad():
        normed = ffn.layer_norm.norm(x_BSD) + ffn.layer_norm.bias
        wi, wo = ffn.DenseReluDense.wi, ffn.DenseReluDense.wo
        inner = torch.relu(normed @ wi.weight.T + wi.bias)
        assert torch.allclose(ffn(x_BSD), x_BSD + inner @ wo.weight.T + wo.bias, atol=1e-6)


def test_lora_is_the_base_with_the_product_added_to_its_weights() -> None:
    model = made("lora")
    plain = tiny_base()
    sites = 0
    for name, layer in model.base.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert layer.lora_A["default"].weight.shape == (8, SIZES["d_model"])
            with torch.no_grad():
                plain.get_submodule(name).weight += 16 / 8 * delta
            sites += 1
    assert sites == 2 * (2 + 2 * 3), "q and v of every attention"
    with torch.no_grad():
        ours = model(**tiny_batch()).logits
        assert torch.allclose(ours, logits_of(plain, **tiny_inputs()), atol=1e-5)
        assert not torch.allclose(ours, logits_of(tiny_base(), **tiny_inputs()), atol=1e-2)


def test_lora_starts_as_the_base() -> None:
    with torch.no_grad():
        ours = lora()(**tiny_batch()).logits
        assert torch.equal(ours, logits_of(tiny_base(), **tiny_inputs()))


def test_prompt_tuning_is_the_prompt_before_the_encoders_input() -> None:
    model, plain = prompt().eval(), tiny_base()
    ((name, virtual_PD),) = model.trainable_parameters()
    assert name == "peft.prompt_encoder.default.embedding.weight"
    started = torch.cat([tiny_prompt(), tiny_prompt()])[:VIRTUAL]
    assert torch.equal(virtual_PD, started), "the description, repeated to the prompt's length"
    given = tiny_inputs()
    embeds = plain.get_input_embeddings()(given["input_ids"])
    rows = len(embeds)
    with torch.no_grad():
        expected = logits_of(
            plain,
            inputs_embeds=torch.cat([virtual_PD.expand(rows, -1, -1), embeds], dim=1),
            attention_mask=torch.cat(
                [torch.ones(rows, VIRTUAL, dtype=torch.long), given["attention_mask"]], dim=1
            ),
        )
        assert torch.allclose(model(**tiny_batch()).logits, expected, atol=1e-6)


def test_a_start_that_was_asked_for_is_kept() -> None:
    given = {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}
    assert not starts_from_text(peft_settings("prompt", given), given)
    assert starts_from_text(peft_settings("prompt", None), None)


def test_a_saved_adapter_config_is_a_peft_config(tmp_path: Path) -> None:
    fields = {"r": 3, "target_modules": ["wo"], "task_type": "SEQ_2_SEQ_LM"}
    peft.LoraConfig(**fields, inference_mode=True).save_pretrained(tmp_path)
    given = read_yaml_mapping(tmp_path / "adapter_config.json")
    assert given["inference_mode"] is True
    model = PeftT5(tiny_base(), peft_settings("peft", given))
    assert sum(each.numel() for _, each in model.trainable_parameters()) == 5 * 3 * (16 + 48)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown type": ("peft", {"peft_type": "LORRA"}, "peft_type: found LORRA; allowed are .*LORA"),
    "unknown field": ("lora", {"rnk": 4}, "peft_config.rnk: LoraConfig has no such field"),
    "needs calls between steps": ("peft", {"peft_type": "ADALORA"}, "ADALORA, which needs a call"),
    "fails as it is put in": (
        "peft",
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [99]},
        "TRAINABLE_TOKENS cannot be put into .*index",
    ),
    "fails when it is called": (
        "peft",
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "num_layers": 1},
        "PREFIX_TUNING cannot be put into .*index",
    ),
    "no length": (
        "peft",
        {"peft_type": "P_TUNING"},
        "num_virtual_tokens: missing; P_TUNING needs it",
    ),
    "another type": ("prompt", {"peft_type": "LORA"}, "found LORA with `method: prompt`"),
    "no such modules": ("lora", {"target_modules": ["query"]}, "cannot be put .*query"),
    "bad value": ("lora", {"r": 0}, "LORA cannot be put .*0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_about_a_wrong_peft_config(name: str) -> None:
    method, given, message = REFUSED[name]
    with pytest.raises(PemtError, match=message) as caught:
        PeftT5(tiny_base(), peft_settings(method, given))
    assert "\n" not in str(caught.value)


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PemtError, match=r"`lora` needs the peft library.*pip install 'peft>="):
        peft_settings("lora", None)
