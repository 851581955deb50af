"""Tiny random T5s of every family, experts for them, and batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from pemt.config.schema import AdapterConfig, ExpertConfig, MixtureConfig
from pemt.model import ExpertSource, PemtT5, TrainedT5, base_shape
from pemt.model.experts import expert_shapes
from pemt.model.inject import LinearSite, linear_sites
from pemt.model.sites import target_sites

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
# Keys and values have half as many heads as queries, and every other layer sees two tokens at each side alone.
GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "query_pre_attn_scalar": 4,
    "sliding_window": 3,
    "max_position_embeddings": 64,
}


def tiny_gemma(**decoder: Any) -> T5GemmaForConditionalGeneration:
    """A T5Gemma of the others' sizes; its decoder may have sizes of its own."""
    sizes = {**GEMMA, "num_hidden_layers": 3, **decoder}
    return T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=GEMMA, decoder=sizes, vocab_size=VOCABULARY)
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SIZES)),
    "t5-v1.1": lambda: T5ForConditionalGeneration(
        T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SIZES)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**SIZES)),
    "t5gemma": tiny_gemma,
}
# transformers 5.17 does not hand T5's position bias to an attention function.
OLD_ATTENTION = Version(transformers.__version__) < Version("5.20")
FFNS = SIZES["num_layers"] + SIZES["num_decoder_layers"]
EXPERT = {
    "lora": ExpertConfig(kind="lora", rank=4, alpha=8.0),
    "bottleneck": ExpertConfig(kind="bottleneck", reduction_factor=12),
    "everywhere": ExpertConfig(kind="lora", rank=2, alpha=8.0, target_modules="all-linear"),
}
MIXTURE = MixtureConfig(prompt_dropout=0.0)
ADAPTER = AdapterConfig(reduction_factor=4)


def ffn_sites(base: Any) -> list[LinearSite]:
    """The FFNs' output projections, encoder then decoder, each from the first layer up."""
    return [each for each in linear_sites(base) if each.spec.is_ffn_output]


def tiny_base(family: str = "t5", seed: int = 0) -> Any:
    """A random base whose layer norms and embeddings are no ones or near-zeros."""
    torch.manual_seed(seed)
    base = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return base.eval()


@functools.cache
def _shape(family: str) -> Any:
    with torch.device("meta"):  # draws no random numbers
        return base_shape(FAMILIES[family]().config)


def tiny_source(
    name: str = "rte",
    kind: Any = "lora",
    *,
    rank: int = 4,
    prompt: int = 3,
    seed: int = 1,
    target_modules: list[str] | str = "",
    family: str = "t5",
) -> ExpertSource:
    """A random source task for `tiny_base`, on the FFNs' outputs where no modules are named."""
    generator = torch.Generator().manual_seed(seed)
    shape = _shape(family)
    sites = target_sites(target_modules or ["wo"], shape)
    shapes = expert_shapes(kind, rank, shape, sites)
    return ExpertSource(
        name=name,
        kind=kind,
        rank=rank,
        alpha=8.0,
        weights={key: torch.randn(shape, generator=generator) for key, shape in shapes.items()},
        prompt_PD=torch.randn(prompt, SIZES["d_model"], generator=generator),
    )


def tiny_sources(kind: str = "lora", experts: int = 3) -> list[ExpertSource]:
    """Sources with prompts of different lengths, LoRA ones of different ranks."""
    return [
        tiny_source(
            f"task{k}", kind, rank=4 + k if kind == "lora" else 4, prompt=2 + k, seed=10 + k
        )
        for k in range(experts)
    ]


def sources_on_sites(family: str = "t5") -> list[ExpertSource]:
    """Sources of different ranks on different layers: everywhere, on q and v, on the FFNs' outputs, in the decoder."""
    places: dict[str, list[str] | str] = {
        "everywhere": "all-linear",
        "attention": ["q", "v"],
        "outputs": ["wo"],
        "decoder": r".*decoder.*\.(k|o)(_proj)?",
    }
    sources = []
    for k, (name, modules) in enumerate(places.items()):
        source = tiny_source(
            name, rank=2 + k, prompt=2 + k, seed=20 + k, target_modules=modules, family=family
        )
        # so many of them would saturate every gate
        weights = {key: 0.3 * tensor for key, tensor in source.weights.items()}
        sources.append(replace(source, weights=weights))
    return sources


def source_model(kind: str = "lora", base: Any = None) -> PemtT5:
    """Stage 1 in evaluation mode."""
    base = tiny_base() if base is None else base
    return PemtT5.source(base, expert=EXPERT[kind], prompt_PD=tiny_prompt()).eval()


def on_sites(base: Any) -> PemtT5:
    """Stage 2 with `sources_on_sites` for any family."""
    family = "t5gemma"
    if base.config.model_type != family:
        gated = str(base.config.feed_forward_proj).startswith("gated")
        family = "t5-v1.1" if gated else "t5"
    return target_model(sources_on_sites(family), base)


def target_model(
    sources: Sequence[ExpertSource] | None = None,
    base: Any = None,
    mixture: MixtureConfig = MIXTURE,
) -> PemtT5:
    """Stage 2 in evaluation mode, with gates and adapters away from their zeros."""
    model = PemtT5.target(
        tiny_base() if base is None else base,
        sources=tiny_sources() if sources is None else sources,
        mixture=mixture,
        adapter=ADAPTER,
        prompt_PD=tiny_prompt(),
    )
    return randomised(model).eval()


def randomised(model: PemtT5) -> PemtT5:
    """The same model with random trained matrices, so that no part of it is without effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def tiny_prompt() -> Tensor:
    return torch.randn(5, SIZES["d_model"], generator=torch.Generator().manual_seed(2))


LENGTHS = (7, 4, 2)


def tiny_batch(lengths: Sequence[int] = LENGTHS, *, extra_padding: int = 0) -> dict[str, Tensor]:
    """Inputs of these lengths, padded on the right; labels of 4, some of them -100."""
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    labels = torch.randint(2, VOCABULARY, (len(lengths), 4), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels[-1, 2:] = -100
    pad = (0, extra_padding)
    return {
        "input_ids": nn.functional.pad(ids * mask, pad),
        "attention_mask": nn.functional.pad(mask, pad),
        "labels": nn.functional.pad(labels, pad, value=-100),
    }


def gradients(model: TrainedT5) -> dict[str, Tensor]:
    """Gradients of all trained parameters, taken out of the model."""
    taken = {}
    for name, parameter in model.trainable_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        taken[name] = parameter.grad
        parameter.grad = None
    return taken


def tiny_inputs(*, extra_padding: int = 0) -> dict[str, Tensor]:
    """`tiny_batch` without its labels."""
    batch = tiny_batch(extra_padding=extra_padding)
    del batch["labels"]
    return batch


def check_padding_and_batch_change_nothing(model: TrainedT5, beams: int) -> None:
    fixed = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6}
    together = model.generate(**tiny_inputs(extra_padding=5), **fixed)
    for row, length in enumerate(LENGTHS):
        alone = {key: value[row : row + 1, :length] for key, value in tiny_inputs().items()}
        assert torch.equal(model.generate(**alone, **fixed)[0], together[row])


def check_greedy(model: TrainedT5) -> None:
    """An answer's tokens are the likeliest ones of a forward pass with them."""
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": None}
    ids = model.generate(**tiny_inputs(), **fixed)[:, 1:]
    with torch.no_grad():
        logits = model(**tiny_inputs(), labels=ids).logits
    assert torch.equal(logits.argmax(-1), ids)
