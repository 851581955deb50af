"""The frozen base model and its tokenizer, from the hub or a local folder."""

from __future__ import annotations

import functools
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pemt.config import RunConfig
from pemt.model.base_files import BaseModelError, lazy_base, refusal, weight_files
from pemt.model.families import FAMILIES, STACKS, UNFIT, family_of, stack_size
from pemt.model.generation import clean_generation_config, ignored_settings, use_clean_generation
from pemt.model.shape import base_shape
from pemt.model.tokenizer import load_tokenizer


def fetch_base(config: RunConfig) -> None:
    """Bring a base model's weights from the hub into its cache, where they are not there and no folder is named.

    Raises:
        BaseModelError: as `load_pretrained`.
    """
    name = config.model_name_or_path
    if not Path(name).is_dir():
        load_config(name)  # tells best what is wrong with a name
        with _loading(name):
            weight_files(name)


def load_pretrained(
    name: str, tokenizer_name: str | None = None, *, lazy: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base model in fp32 and tokenizer.

    Args:
        name: hub id or folder.
        tokenizer_name: likewise, where the tokenizer lies elsewhere.
        lazy: leave the weights in their files, where these can be mapped; `Engine.prepare` reads them.

    Raises:
        BaseModelError: the model cannot be loaded, is no T5, or embeds fewer tokens than there are.
        TokenizerError: the tokenizer cannot be loaded.
    """
    model_config = load_config(name)
    tokenizer_name = tokenizer_name or name
    tokenizer = load_tokenizer(tokenizer_name)
    _check_tokenizer(tokenizer, tokenizer_name, model_config)
    with _loading(name):
        # DeepSpeed casts to the run's precision and keeps its masters; everything starts from fp32.
        base = lazy_base(name, model_config) if lazy else None
        if base is None:
            weight_files(name)  # refuses an index that leads out of the folder
            with bars_on_terminals_alone():
                base = AutoModelForSeq2SeqLM.from_pretrained(
                    name,
                    config=model_config,
                    dtype=torch.float32,
                    # The files' own may be refused; it is not used anyway.
                    generation_config=clean_generation_config(model_config, tokenizer),
                )
    use_clean_generation(base, tokenizer)
    if os.environ.get("RANK", "0") == "0":
        _tell_ignored_settings(name, tuple(ignored_settings(name, base.generation_config)))
    return base, tokenizer


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, tokenizer_name: str, config: PreTrainedConfig
) -> None:
    shape, name = base_shape(config), config.name_or_path
    embedded = min(stack_size(shape, stack, "vocab_size") for stack in STACKS)
    if len(tokenizer) > embedded:
        raise BaseModelError(
            f"tokenizer_name: `{tokenizer_name}` has {len(tokenizer)} tokens, the base model "
            f"`{name}` embeds {embedded}; give the tokenizer it was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"tokenizer_name: `{tokenizer_name}` has no eos_token, which ends every answer; give the tokenizer "
            f"that `{name}` was trained with"
        )


@functools.cache  # once a process
def _tell_ignored_settings(name: str, settings: tuple[str, ...]) -> None:
    if settings:
        print(
            f"pemt: generation settings of {name} are not used: {', '.join(settings)}; answers and scores are by "
            "num_beams and max_target_length alone",
            file=sys.stderr,
            flush=True,
        )


def precision_warning(config: RunConfig, base: PreTrainedModel) -> str | None:
    """A line on fp16 where the base model is known to overflow in it: by its family and width."""
    shape = base_shape(base.config)
    family = family_of(shape)
    if not config.fp16 or shape["d_model"] < family.fp16_overflows_from:
        return None
    return (
        f"warning: fp16: activations of a {family.title} as wide as {config.model_name_or_path} (d_model "
        f"{shape['d_model']}) exceed fp16's 65,504, and steps are lost; train with --fp16 false --bf16 true"
    )


def load_config(name: str) -> PreTrainedConfig:
    """A base model's config.json, by hub id or folder.

    Raises:
        BaseModelError: it cannot be read, or is of no family in `families`.
    """
    with _loading(name):
        # Looked at before a class is chosen: of a type that it does not know, transformers' AutoConfig would
        # offer to run the repository's own code.
        found = PreTrainedConfig.get_config_dict(name)[0]
        model_type = found.get("model_type")
        if model_type not in tuple(FAMILIES):  # it may be anything that JSON can hold
            why = f", and {UNFIT[model_type]}" if model_type in tuple(UNFIT) else ""
            raise BaseModelError(
                f"model_name_or_path: `{name}` is a {model_type} model{why}; PEMT needs one of {', '.join(FAMILIES)}"
            )
        _refuse_quantized(name, found.get("quantization_config"))
        return CONFIG_MAPPING[model_type].from_pretrained(name, name_or_path=name)


def _refuse_quantized(name: str, found: Any) -> None:
    """8-bit and 4-bit weights, and what else is no plain number."""
    if not found:
        return
    settings = found if isinstance(found, dict) else {}
    method = str(settings.get("quant_method") or "bitsandbytes")
    bits = {"load_in_8bit": "8", "load_in_4bit": "4"}
    width = next((bits[key] for key in bits if settings.get(key)), settings.get("bits"))
    raise BaseModelError(
        f"model_name_or_path: `{name}` is quantized ({method}{f', {width}-bit' if width else ''}: quantization_config "
        "in its config.json); PEMT trains on weights in fp32, bf16 or fp16: give the model that it was made from"
    )


@contextmanager
def bars_on_terminals_alone() -> Iterator[None]:
    """transformers' bars over weights read and written, which go to stderr, are noise in a file."""
    bars = transformers.logging
    shown = bars.is_progress_bar_enabled()
    if shown and not sys.stderr.isatty():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What fails to load within is told in one line, as a BaseModelError."""
    try:
        yield
    except BaseModelError:
        raise
    except pickle.UnpicklingError as error:
        raise BaseModelError(
            f"model_name_or_path: `{name}`: its weights are refused: {refusal(error)}; "
            "give a model in safetensors"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise BaseModelError(
            f"model_name_or_path: `{name}` cannot be loaded ({first_line}); "
            "give a hub id, or a folder with config.json and weights"
        ) from None
