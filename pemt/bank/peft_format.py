"""PEFT's files of a LoRA adapter, `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), on linear
layers of a T5.

Only the format is read and written here; the package itself is not needed.

Shapes: F input width, D output width, R rank of one layer's adapter, P prompt tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pemt.bank.manifests import BankError
from pemt.bank.peft_files import (
    CONFIG,
    PROMPT,
    PROMPT_FILE,
    TENSORS,
    load_adapter,
    read_prompt,
)
from pemt.config import read_json_object
from pemt.model import ExpertSource, Site, absent_sites, is_linear, sites_of
from pemt.storage import Count, Positive, checked, save_tensors

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_FACTORS = {"A": "down", "B": "up"}
_LETTERS = {ours: theirs for theirs, ours in _FACTORS.items()}
# Settings that leave the adapter a plain LoRA whatever they say; any other must be empty or false.
_HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "use_rslora"),
}
# Starts of training that change the base's own weights and leave only a difference to them.
_CHANGES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What is read of an adapter's configuration, as PEFT spells it; patterns may be null."""

    r: Count
    lora_alpha: Positive
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, Positive] | None = None


@dataclass(frozen=True, kw_only=True)
class PeftLora:
    """A LoRA adapter as an expert.

    Args:
        rank: of the layer that has the most.
        alpha: of all layers; output = (alpha / rank) · (x downᵀ) upᵀ.
        weights: by `<site>.down` [R,F] and `<site>.up` [D,R], fp32.
        prompt_PD: the task prompt, where the folder was written by `write_peft`.
        sites: what it is on, in the order of `sites_of`.
        absent: sites of the same kinds that it is not on, as with PEFT's `layers_to_transform`.
    """

    rank: int
    alpha: float
    weights: dict[str, Tensor]
    prompt_PD: Tensor | None
    sites: list[str]
    absent: list[str]


def read_base_name(folder: Path) -> str | None:
    """The base model that an adapter's configuration names.

    Raises:
        BankError: the configuration cannot be read.
    """
    return _read_settings(folder).base_model_name_or_path


def read_peft(folder: Path, shape: Mapping[str, Any]) -> PeftLora:
    """Read an adapter for a base model of this `base_shape`.

    Layers may differ in rank and alpha (`rank_pattern`, `alpha_pattern`): all are brought to one scale by a factor on
    `up`, which changes no output.

    Raises:
        BankError: a file is missing or malformed, the adapter is no plain LoRA, or it is on
            something else than linear layers of the base.
    """
    settings = _read_settings(folder)
    sites = sites_of(shape)
    path, tensors = load_adapter(folder)
    factors = _factors(path, tensors, {site.module: site for site in sites}, shape)
    scales = {
        site: _scale(path, settings, site, len(pair["down"])) for site, pair in factors.items()
    }
    touched = [site for site in sites if site in factors]
    common = scales[touched[0]]
    weights = {}
    for site in touched:
        pair = factors[site]
        _check_widths(path, site, pair, shape)
        weights[f"{site.name}.down"] = pair["down"]
        weights[f"{site.name}.up"] = pair["up"] * (scales[site] / common)
    rank = max(len(pair["down"]) for pair in factors.values())
    return PeftLora(
        rank=rank,
        alpha=common * rank,
        weights=weights,
        prompt_PD=read_prompt(folder),
        sites=[site.name for site in touched],
        absent=absent_sites([site.name for site in touched], shape),
    )


def write_peft(
    folder: Path, source: ExpertSource, *, base_name: str, shape: Mapping[str, Any]
) -> Path:
    """Write a LoRA source as `peft.PeftModel.from_pretrained` reads it, and its prompt beside it.

    Raises:
        BankError: the expert is no LoRA, the folder is not empty, or cannot be written.
    """
    if source.kind != "lora":
        raise BankError(
            f"source `{source.name}`: is a {source.kind} expert, and PEFT has no such adapter; "
            "only lora experts can be exported"
        )
    config = {"base_model_name_or_path": base_name, **_lora_settings(source, shape)}
    tensors = {}
    for key, tensor in source.weights.items():
        site, _, factor = key.rpartition(".")
        module = Site.from_name(site, shape).module
        name = f"base_model.model.{module}.lora_{_LETTERS[factor]}.weight"
        tensors[name] = tensor.float().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise BankError(f"{folder}: is not empty; give a new folder")
        save_tensors(tensors, folder / TENSORS)
        save_tensors({PROMPT: source.prompt_PD.float().contiguous()}, folder / PROMPT_FILE)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BankError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder


def _lora_settings(source: ExpertSource, shape: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json but for the base model's name."""
    factors = (key.rpartition(".") for key in source.weights)
    ranks = {
        Site.from_name(site, shape): len(source.weights[f"{site}.down"])
        for site, _, factor in factors
        if factor == "down"
    }
    others = {site.module: rank for site, rank in ranks.items() if rank != source.rank}
    scale = source.alpha / source.rank
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": True,
        "target_modules": _target_modules(list(ranks), shape),
        "r": source.rank,
        "lora_alpha": _plain(source.alpha),
        "rank_pattern": others,
        "alpha_pattern": {module: _plain(scale * rank) for module, rank in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _target_modules(sites: list[Site], shape: Mapping[str, Any]) -> list[str]:
    """Ends of modules' names that mean these sites and no others; whole names where no ends do."""
    ends = list(dict.fromkeys(_end(site) for site in sites))
    meant = [site for site in sites_of(shape) if _end(site) in ends]
    return ends if set(meant) == set(sites) else [site.module for site in sites]


def _end(site: Site) -> str:
    return site.module.rpartition(".")[2]


def _plain(number: float) -> float:
    """PEFT's alphas are whole numbers wherever they can be."""
    return int(number) if number == int(number) else number


def _read_settings(folder: Path) -> _Settings:
    path = folder / CONFIG
    missing = f"{path}: does not exist; needed is an adapter's folder"
    config = read_json_object(path, BankError, missing=missing)
    if (kind := config.get("peft_type")) != "LORA":
        raise BankError(f"{path}: peft_type: found {kind}, allowed is LORA")
    _check_plain(path, config)
    try:
        return checked(_Settings, config)
    except ValueError as error:
        raise BankError(f"{path}: {error}; save the adapter again with PEFT") from None


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    """Refuse everything that makes the adapter compute something else than a LoRA."""
    for key, value in config.items():
        if key not in _HARMLESS and value and (key, value) != ("bias", "none"):
            shown = json.dumps(value)
            raise BankError(
                f"{path}: {key}: found {shown[:80]}, which is more than a plain LoRA; allowed is none"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise BankError(
            f"{path}: init_lora_weights: found `{start}`, which changes the base model's own weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _factors(
    path: Path, tensors: Mapping[str, Tensor], sites: Mapping[str, Site], shape: Mapping[str, Any]
) -> dict[Site, dict[str, Tensor]]:
    """Both factors by site; whatever else the file holds is refused."""
    factors: dict[Site, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        site = sites.get(match["module"]) if match else None
        if match and site is None and is_linear(match["module"]):
            raise BankError(
                f"{path}: has a LoRA on {match['module']}, this base model has {shape['num_layers']} encoder and "
                f"{shape['num_decoder_layers']} decoder layers of feed_forward_proj {shape['feed_forward_proj']}; "
                "name the base model it was trained on"
            )
        if match is None or site is None or tensor.dim() != 2:
            strangers.append(key)
            continue
        factors.setdefault(site, {})[_FACTORS[match["factor"]]] = tensor.float()
    if strangers:
        modules = sorted({_module(key) for key in strangers})
        raise BankError(
            f"{path}: found adapters on {', '.join(modules)} ({len(strangers)} of {len(tensors)} "
            f"tensors); an expert is a LoRA on {_allowed(sites)} alone: train it with these as "
            "target_modules"
        )
    halves = [site.name for site, pair in factors.items() if len(pair) < 2]
    if not factors or halves:
        what = f"one factor of {halves[0]} alone" if halves else "no tensor"
        raise BankError(f"{path}: has {what}; save the adapter again")
    return factors


def _allowed(sites: Mapping[str, Site]) -> str:
    *first, last = dict.fromkeys(_end(site) for site in sites.values())
    return f"{', '.join(first)} or {last}"


def _module(key: str) -> str:
    """`SelfAttention.q` of a tensor's name: the part that tells a person which module it is."""
    plain = re.sub(
        r"\.(lora_\w+|weight|bias|default)\b.*", "", key.removeprefix("base_model.model.")
    )
    return ".".join(part for part in plain.split(".")[-2:] if not part.isdigit())


def _scale(path: Path, settings: _Settings, site: Site, rank: int) -> float:
    """alpha / rank of one layer, or alpha / √rank for a rank-stabilised LoRA."""
    try:
        expected = _of_pattern(settings.rank_pattern or {}, site.module, settings.r)
        alpha = _of_pattern(settings.alpha_pattern or {}, site.module, settings.lora_alpha)
    except (re.error, OverflowError, RecursionError) as error:
        raise BankError(
            f"{path.with_name(CONFIG)}: rank_pattern, alpha_pattern: a key is no regular expression: {error}"
        ) from None
    if rank != expected:
        raise BankError(
            f"{path}: the LoRA on {site.name} has rank {rank}, {CONFIG} says {expected}"
        )
    return alpha / rank**0.5 if settings.use_rslora else alpha / rank


def _of_pattern(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first key that the end of the module's name matches, as PEFT looks it up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _check_widths(
    path: Path, site: Site, pair: Mapping[str, Tensor], shape: Mapping[str, Any]
) -> None:
    rank, (inputs, outputs) = len(pair["down"]), site.widths(shape)
    needed = {"down": (rank, inputs), "up": (outputs, rank)}
    for factor, size in needed.items():
        if tuple(pair[factor].shape) != size:
            raise BankError(
                f"{path}: lora_{_LETTERS[factor]} of {site.name} is {list(pair[factor].shape)}, this base model "
                f"needs {list(size)}; name the base model it was trained on"
            )
