"""The generation settings that answers are scored and given with: ours, never the base model's own.

A base model's `generation_config.json`, or an old `config.json`, may hold a least length, suppressed or forced
tokens, beams: right for what it was published for, and wrong for another task's labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from pemt.model.shape import decoder_start

# Values that change nothing, beside those that are empty, 0 or false.
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "length_penalty"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1),
    "top_k": 50,
    "use_cache": True,
}
# A model's own fields, and bookkeeping; the ids are the same or listed below.
NO_SETTINGS = (
    "bos_token_id",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
    "use_cache",
)
# transformers' pipelines put these over everything else.
ONLY_IN_CONFIG = ("task_specific_params", "prefix")


def clean_generation_config(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Greedy search with the ids that training uses, and nothing else.

    Args:
        config: the base model's: its decoder's start is what `forward` puts before the labels.
        tokenizer: ends every label with its end of sequence.
    """
    pad_id = tokenizer.pad_token_id
    return GenerationConfig(
        pad_token_id=config.pad_token_id if pad_id is None else pad_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=decoder_start(config),
    )


def use_clean_generation(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model, in place, the settings that answers are scored with."""
    base.generation_config = clean_generation_config(base.config, tokenizer)
    for name in ONLY_IN_CONFIG:  # an exported model would hand them on
        vars(base.config).pop(name, None)


def ignored_settings(name: str, ours: GenerationConfig) -> list[str]:
    """What a base model's files say of generation and `ours` does not, as `name value`.

    Args:
        name: hub id or folder.
    """
    in_config, _ = PreTrainedConfig.get_config_dict(name)
    known = {*vars(GenerationConfig()), *ONLY_IN_CONFIG} & in_config.keys()
    found: dict[str, Any] = {}
    for given in ({key: in_config[key] for key in known}, _own_file(name)):
        found |= {key: value for key, value in given.items() if _is_ignored(key, value, ours)}
    return [f"{key} {_short(value)}" for key, value in sorted(found.items())]


def _own_file(name: str) -> dict[str, Any]:
    """What generation_config.json holds; older models have none, and of a broken one nothing is used."""
    try:
        path = cached_file(
            name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False
        )
        own = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return own if isinstance(own, dict) else {}


def _is_ignored(key: str, value: Any, ours: GenerationConfig) -> bool:
    if key.startswith("_") or key in NO_SETTINGS or value is None:
        return False
    if key.endswith("_id"):  # of which 0 is one like another
        return value not in (getattr(ours, key, None), [getattr(ours, key, None)])
    return bool(value) and value != NEUTRAL.get(key)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, dict):
        return f"({', '.join(map(str, value))})"
    return text if len(text) <= 40 else f"{text[:37]}..."
