"""Baselines from the `peft` library (an optional extra): LoRA, prompt tuning, and whatever else it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pemt.config import PemtError, nearest
from pemt.model.families import FAMILIES, family_of
from pemt.model.inject import Base, checked_base
from pemt.model.lazy import materialize_all
from pemt.model.shape import base_shape, decoder_start
from pemt.model.trained_t5 import TrainedT5, log_likelihoods

# What `--method lora` and `--method prompt` stand for; `peft_config` overrides single fields.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]},
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 100},
    "peft": {},
}
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
# Keys and values before those of the decoder's self-attention.
PREFIXES = ("CARTRIDGE", "PREFIX_TUNING")
# Fields without a default that would do.
NEEDED = {
    **dict.fromkeys((*PROMPTS, *PREFIXES), "num_virtual_tokens"),
    "TRAINABLE_TOKENS": "token_indices",
}
NO_ENCODER = "is made for models without an encoder"
UNFIT = {
    "ADALORA": "needs a call after every step",
    "ADAPTION_PROMPT": NO_ENCODER,
    "CPT": NO_ENCODER,
    "MULTITASK_PROMPT_TUNING": "trains on several tasks at once",
    "POLY": "trains on several tasks at once",
    "SHADOW": NO_ENCODER,
    "XLORA": "mixes adapters that were trained before",
}


class PeftError(PemtError):
    """`peft` is not installed, or cannot do what `peft_config` says."""


def peft_settings(method: str, given: Mapping[str, Any] | None) -> Any:
    """A checked `peft.PeftConfig`: the method's defaults, and over them what was given.

    Args:
        method: `lora`, `prompt` or `peft`.
        given: fields of the PeftConfig; with `peft` also `peft_type`.

    Raises:
        PeftError: peft is not installed, has no such type or field, or the type does not fit here.
    """
    try:
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise PeftError(
            f"method: `{method}` needs the peft library; install it with `pip install 'peft>=0.19'`"
        ) from None
    fields = {**DEFAULTS[method], **(given or {})}
    known = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    kind = str(fields.get("peft_type", "nothing")).upper()
    if kind not in known or kind in UNFIT:
        fit = ", ".join(name for name in known if name not in UNFIT)
        why = f", which {UNFIT[kind]}" if kind in UNFIT else ""
        raise PeftError(f"peft_config.peft_type: found {kind}{why}; allowed are {fit}")
    if kind != DEFAULTS[method].get("peft_type", kind):
        raise PeftError(
            f"peft_config.peft_type: found {kind} with `method: {method}`; choose `method: peft`"
        )
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    _check_fields(fields, cls)
    if kind in NEEDED and not fields.get(NEEDED[kind]):
        raise PeftError(f"peft_config.{NEEDED[kind]}: missing; {kind} needs it")
    if kind in PROMPTS:
        # Otherwise peft keeps a second prompt for the decoder, and never uses it.
        fields.setdefault("num_transformer_submodules", 1)
    # An adapter_config.json says `inference_mode: true`, which would freeze everything.
    fields |= {"peft_type": kind, "task_type": "SEQ_2_SEQ_LM", "inference_mode": False}
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise PeftError(f"peft_config: {_first_line(error)}") from None


def _check_fields(fields: Mapping[str, Any], cls: type[Any]) -> None:
    names = [each.name for each in dataclasses.fields(cls) if each.init]
    for key in fields:
        if key not in names:
            hint = nearest(str(key), names, what=f"allowed are {names}")
            raise PeftError(f"peft_config.{key}: {cls.__name__} has no such field{hint}")


class PeftT5(TrainedT5):
    """A T5 with what peft puts into it; trained is what peft marks.

    Args:
        base: changed in place.
        settings: what `peft_settings` gave.
        prompt_PD: what a prompt of unspecified start begins with, repeated to its length [P,D].

    Raises:
        PeftError: peft cannot put it into this base model, or the model that it gives cannot be called.
        ModelError: the base is no T5.
    """

    def __init__(
        self, base: PreTrainedModel, settings: Any, *, prompt_PD: Tensor | None = None
    ) -> None:
        from peft import get_peft_model

        super().__init__()
        base = checked_base(base)
        materialize_all(base)  # some of peft's ways to start look at the weights
        kind = settings.peft_type.value
        _fit_sizes(settings, base)
        _fit_modules(settings, base)
        try:
            self.peft = get_peft_model(base, settings)
            self._try()
            if kind in PREFIXES:
                self._try_generate()
        except Exception as error:  # whatever peft raises
            raise PeftError(
                f"peft_config: {kind} cannot be put into this base model: {_first_line(error)}"
            ) from error
        self._marked = [each for each in self.peft.parameters() if each.requires_grad]
        if not self._marked:
            raise PeftError(f"peft_config: {kind} leaves nothing to train")
        if prompt_PD is not None:
            self._start_prompt(prompt_PD)
        self.freeze_untrained()

    def _try(self) -> None:
        """One pass over two tokens: some of peft's types fail only here, and not after the data is read."""
        token = torch.zeros(1, 2, dtype=torch.long)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            self(input_ids=token, attention_mask=torch.ones_like(token), labels=token)

    @torch.no_grad()
    def _try_generate(self) -> None:
        """One token of an answer: a prefix reaches `generate` by its name for a cache, which has changed."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        token = torch.zeros(1, 2, dtype=torch.long)
        inputs = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        start = torch.tensor([[decoder_start(self.base.config)]])
        taught_1V = self.peft(**inputs, decoder_input_ids=start).logits[:, 0]
        without_1V = self.base(**inputs, decoder_input_ids=start).logits[:, 0]
        told_1V = self.peft.generate(
            **inputs, **self.generation_cache(), max_new_tokens=1, num_beams=1, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        ).logits[0]  # fmt: skip
        for module, training in modes:
            module.training = training
        if (told_1V - without_1V).abs().max() < (told_1V - taught_1V).abs().max():
            raise PeftError(
                f"its answers would lack the prefix: peft {version('peft')} does not hand it to transformers "
                f"{version('transformers')}; install transformers<5.24, or a newer peft"
            )

    @property
    def base(self) -> Base:  # type: ignore[override]
        """The T5 inside peft's model; twice in the tree, ZeRO-3 would gather it twice."""
        return self.peft.get_base_model()

    @property
    def called(self) -> Any:
        """What is called in the base model's place: peft's model."""
        return self.peft

    @torch.no_grad()
    def label_log_likelihoods(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        if not self.peft.active_peft_config.is_prompt_learning:
            return super().label_log_likelihoods(input_ids, attention_mask, labels)

        # What stands before the encoder's input peft puts there itself, in a pass of all.
        def logits_of(targets_BT: Tensor) -> Tensor:
            return self(input_ids, attention_mask, targets_BT).logits

        return log_likelihoods(logits_of, labels, input_ids), None

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        yield from self._marked

    def _start_prompt(self, prompt_PD: Tensor) -> None:
        embedding = self.peft.prompt_encoder[self.peft.active_adapter].embedding.weight
        repeats = -(-len(embedding) // len(prompt_PD))
        with torch.no_grad():
            embedding.copy_(prompt_PD.repeat(repeats, 1)[: len(embedding)])


def _fit_sizes(settings: Any, base: PreTrainedModel) -> None:
    """Fill in what peft would guess: the decoder's sizes for a prefix, the encoder's for a prompt.

    Of a prefix it takes the encoder's depth and the width of the embeddings; of a family with a configuration for each
    stack it knows nothing.
    """
    kind, shape = settings.peft_type.value, base_shape(base.config)
    if kind in PREFIXES:
        family = family_of(shape)
        if not family.takes_prefix:
            raise PeftError(
                f"peft_config.peft_type: found {kind}, whose prefix does not fit the keys and values of a "
                f"{family.title}; allowed are types without a prefix"
            )
        sizes = (shape["num_decoder_layers"], shape["num_heads"] * shape["d_kv"])
    elif kind in PROMPTS:
        sizes = (shape["num_layers"], shape["d_model"])
    else:
        return
    for name, size in zip(("num_layers", "token_dim"), sizes, strict=True):
        if getattr(settings, name) is None:
            setattr(settings, name, size)
    if settings.num_attention_heads is None:
        settings.num_attention_heads = shape["num_heads"]


def _fit_modules(settings: Any, base: PreTrainedModel) -> None:
    """Give T5's names of projections, as `--method lora` has them, the family's own."""
    named = getattr(settings, "target_modules", None)
    if isinstance(named, list | set | tuple):
        own = {
            theirs: ours
            for parts in FAMILIES[base.config.model_type].parts.values()
            for part in parts.values()
            for theirs, ours in part.linears.items()
        }
        settings.target_modules = {own.get(name, name) for name in named}


def starts_from_text(settings: Any, given: Mapping[str, Any] | None) -> bool:
    """Whether a prompt is to start as the task's description: where nothing else was asked for."""
    return settings.peft_type.value == "PROMPT_TUNING" and "prompt_tuning_init" not in (given or {})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
