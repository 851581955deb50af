"""PEFT's files of a LoRA adapter, `adapter_config.json` and `adapter_model.safetensors`, on T5's `wo`.

Only the format is read and written here; the package itself is not needed.

Shapes: F d_ff, D d_model, R rank of one FFN's adapter, P prompt tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pemt.config import PemtError
from pemt.model import ExpertSource
from pemt.storage import Count, Positive, checked, save_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Not PEFT's: our task prompt, beside its files, so that nothing is lost on the way out and back.
PROMPT_FILE, PROMPT = "pemt_prompt.safetensors", "prompt"
FILES = (CONFIG, TENSORS, PROMPT_FILE)

_WO = re.compile(
    r"base_model\.model\.(?P<stack>encoder|decoder)\.block\.(?P<layer>\d+)\.layer\.(?P<ffn>[12])\."
    r"DenseReluDense\.wo\.lora_(?P<factor>[AB])\.weight"
)
_FFN_LAYER = {"encoder": 1, "decoder": 2}
_FACTORS = {"A": "down", "B": "up"}
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


class PeftFormatError(PemtError):
    """A folder that is no LoRA adapter on T5's `wo` in PEFT's format."""


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
        base_name: the base model that its configuration names; None where it names none.
        rank, alpha: of all FFNs; output = (alpha / rank) · (x downᵀ) upᵀ.
        weights: by `<stack>.<layer>.down` [R,F] and `.up` [D,R], fp32, every FFN of the base.
        prompt_PD: the task prompt, where the folder was written by `write_peft`.
        absent: FFNs that the adapter does not touch; their factors are zero.
    """

    base_name: str | None
    rank: int
    alpha: float
    weights: dict[str, Tensor]
    prompt_PD: Tensor | None
    absent: list[str]


def read_base_name(folder: Path) -> str | None:
    """The base model that an adapter's configuration names.

    Raises:
        PeftFormatError: the configuration cannot be read.
    """
    return _read_settings(folder).base_model_name_or_path


def read_peft(folder: Path, shape: Mapping[str, Any]) -> PeftLora:
    """Read an adapter for a base model of this `base_shape`.

    FFNs may differ in rank and alpha (`rank_pattern`, `alpha_pattern`): all are brought to the largest
    rank by rows of zeros and to one scale by a factor on `up`, which changes no output.

    Raises:
        PeftFormatError: a file is missing or malformed, the adapter is no plain LoRA, or it is on
            other modules than `wo`.
    """
    settings = _read_settings(folder)
    factors = _factors(folder / TENSORS, folder)
    sites = [
        f"{stack}.{layer}"
        for stack, count in (
            ("encoder", shape["num_layers"]),
            ("decoder", shape["num_decoder_layers"]),
        )
        for layer in range(count)
    ]
    beyond = sorted(set(factors) - set(sites))
    if beyond:
        raise PeftFormatError(
            f"{folder / TENSORS}: has a LoRA on {beyond[0]}, this base model has "
            f"{shape['num_layers']} encoder and {shape['num_decoder_layers']} decoder layers"
        )
    rank = max(len(pair["down"]) for pair in factors.values())
    scales = {site: _scale(folder, settings, site, len(factors[site]["down"])) for site in factors}
    common = next(iter(scales.values()))
    weights = {}
    for site in sites:
        pair = factors.get(site)
        down_RF = torch.zeros(rank, shape["d_ff"])
        up_DR = torch.zeros(shape["d_model"], rank)
        if pair is not None:
            _check_widths(folder / TENSORS, site, pair, shape)
            used = len(pair["down"])
            down_RF[:used] = pair["down"]
            up_DR[:, :used] = pair["up"] * (scales[site] / common)
        weights[f"{site}.down"], weights[f"{site}.up"] = down_RF, up_DR
    return PeftLora(
        base_name=settings.base_model_name_or_path,
        rank=rank,
        alpha=common * rank,
        weights=weights,
        prompt_PD=_read_prompt(folder),
        absent=[site for site in sites if site not in factors],
    )


def write_peft(folder: Path, source: ExpertSource, *, base_name: str) -> Path:
    """Write a LoRA source as `peft.PeftModel.from_pretrained` reads it, and its prompt beside it.

    Raises:
        PeftFormatError: the expert is no LoRA, the folder is not empty, or cannot be written.
    """
    if source.kind != "lora":
        raise PeftFormatError(
            f"source `{source.name}`: is a {source.kind} expert, and PEFT has no such adapter; "
            "only lora experts can be exported"
        )
    tensors = {}
    for key, tensor in source.weights.items():
        stack, layer, factor = key.split(".")
        letter = {ours: theirs for theirs, ours in _FACTORS.items()}[factor]
        name = f"base_model.model.{stack}.block.{layer}.layer.{_FFN_LAYER[stack]}.DenseReluDense.wo"
        tensors[f"{name}.lora_{letter}.weight"] = tensor.float().contiguous()
    alpha = source.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": ["wo"],
        "r": source.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise PeftFormatError(f"{folder}: is not empty; give a new folder")
        save_tensors(tensors, folder / TENSORS)
        save_tensors({PROMPT: source.prompt_PD.float().contiguous()}, folder / PROMPT_FILE)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PeftFormatError(f"{folder}: cannot be written: {error.strerror}") from None
    return folder


def _read_settings(folder: Path) -> _Settings:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PeftFormatError(f"{path}: does not exist; needed is an adapter's folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PeftFormatError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise PeftFormatError(f"{path}: peft_type: found {found}, allowed is LORA")
    _check_plain(path, config)
    try:
        return checked(_Settings, config)
    except ValueError as error:
        raise PeftFormatError(f"{path}: {error}; save the adapter again with PEFT") from None


def _check_plain(path: Path, config: dict[str, Any]) -> None:
    """Refuse everything that makes the adapter compute something else than a LoRA."""
    for key, value in config.items():
        if key not in _HARMLESS and value and (key, value) != ("bias", "none"):
            shown = json.dumps(value)
            raise PeftFormatError(
                f"{path}: {key}: found {shown[:80]}, which is more than a plain LoRA; allowed is none"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise PeftFormatError(
            f"{path}: init_lora_weights: found `{start}`, which changes the base model's own weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _factors(path: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Both factors by FFN; whatever else the file holds is refused."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        other = " (adapter_model.bin is a pickle and is not read)"
        tail = other if (folder / "adapter_model.bin").is_file() else ""
        raise PeftFormatError(f"{path}: does not exist{tail}; save it as safetensors") from None
    except (OSError, SafetensorError) as error:
        raise PeftFormatError(f"{path}: cannot be read: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        match = _WO.fullmatch(key)
        if match is None or int(match["ffn"]) != _FFN_LAYER[match["stack"]] or tensor.dim() != 2:
            strangers.append(key)
            continue
        site = factors.setdefault(f"{match['stack']}.{match['layer']}", {})
        site[_FACTORS[match["factor"]]] = tensor.float()
    if strangers:
        modules = sorted({_module(key) for key in strangers})
        raise PeftFormatError(
            f"{path}: found adapters on {', '.join(modules)} ({len(strangers)} of {len(tensors)} "
            "tensors); an expert is a LoRA on the FFNs' `wo` alone: train it with target_modules=['wo']"
        )
    halves = [site for site, pair in factors.items() if len(pair) < 2]
    if not factors or halves:
        what = f"one factor of {halves[0]} alone" if halves else "no tensor"
        raise PeftFormatError(f"{path}: has {what}; save the adapter again")
    return factors


def _module(key: str) -> str:
    """`SelfAttention.q` of a tensor's name: the part that tells a person which module it is."""
    plain = re.sub(
        r"\.(lora_\w+|weight|bias|default)\b.*", "", key.removeprefix("base_model.model.")
    )
    return ".".join(part for part in plain.split(".")[-2:] if not part.isdigit())


def _scale(folder: Path, settings: _Settings, site: str, rank: int) -> float:
    """alpha / rank of one FFN, or alpha / √rank for a rank-stabilised LoRA."""
    stack, layer = site.split(".")
    name = f"{stack}.block.{layer}.layer.{_FFN_LAYER[stack]}.DenseReluDense.wo"
    try:
        expected = _of_pattern(settings.rank_pattern or {}, name, settings.r)
        alpha = _of_pattern(settings.alpha_pattern or {}, name, settings.lora_alpha)
    except (re.error, OverflowError, RecursionError) as error:
        raise PeftFormatError(
            f"{folder / CONFIG}: rank_pattern, alpha_pattern: a key is no regular expression: {error}"
        ) from None
    if rank != expected:
        raise PeftFormatError(
            f"{folder / TENSORS}: the LoRA on {site} has rank {rank}, {CONFIG} says {expected}"
        )
    return alpha / rank**0.5 if settings.use_rslora else alpha / rank


def _of_pattern(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first key that the end of the module's name matches, as PEFT looks it up."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _check_widths(
    path: Path, site: str, pair: Mapping[str, Tensor], shape: Mapping[str, Any]
) -> None:
    rank = len(pair["down"])
    needed = {"down": (rank, shape["d_ff"]), "up": (shape["d_model"], rank)}
    for factor, size in needed.items():
        if tuple(pair[factor].shape) != size:
            letter = {ours: theirs for theirs, ours in _FACTORS.items()}[factor]
            raise PeftFormatError(
                f"{path}: lora_{letter} of {site} is {list(pair[factor].shape)}, this base model "
                f"needs {list(size)}; name the base model it was trained on"
            )


def _read_prompt(folder: Path) -> Tensor | None:
    path = folder / PROMPT_FILE
    if not path.is_file():
        return None
    try:
        return load_file(path)[PROMPT].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise PeftFormatError(f"{path}: cannot be read: {error}") from None
