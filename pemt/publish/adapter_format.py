"""The published form of an adaptation: `adapter_config.json` and `adapter_model.safetensors`.

The names are PEFT's, so that the hub shows the folder as an adapter; the type, PEMT, is our own, and
PEFT refuses it instead of misreading it. The tensors are

    trained.<parameter>     what the run has trained, under `TrainedT5.trainable_parameters`' names
    expert.<k>.<tensor>     the frozen expert of source k, as in `ExpertSource.weights`
    expert.<k>.prompt       its prompt

and nothing of the base model but the layer norms that were trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pemt.config import AdapterConfig, MixtureConfig, PemtError, read_json_object
from pemt.model import BitFitT5, ExpertSource, PemtT5, TrainedT5, base_digest, checked_base
from pemt.storage import Count, Positive, checked

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_TYPE, FORMAT = "PEMT", 1
METHODS = ("pemt", "adapter", "bitfit")
Dtype = Literal["float32", "bfloat16", "float16"]
TRAINED, EXPERT, PROMPT = "trained.", "expert.", "prompt"
PROMPT_PARAMETER = "prompt.prompt"  # of PemtT5


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One expert, without its tensors: see `ExpertSource`."""

    name: str
    kind: Literal["lora", "bottleneck"]
    rank: Count
    alpha: Positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `adapter_config.json` says, beside `peft_type`.

    Args:
        format: version of this layout.
        method: `pemt`, `adapter` or `bitfit`.
        base_model_name_or_path: hub id or folder of the frozen base model.
        base_sha256: `base_digest` of its weights.
        tokenizer_name: where the tokenizer is not the base model's.
        task_name, template, labels: what it was adapted to, and what its inputs look like.
        label_names: what the task calls the labels; none where they are called what they are.
        max_source_length, max_new_tokens, num_beams: how it was scored, tokens and beams.
        reduction_factor: of the target adapter.
        train_layer_norms: whether the layer norms are among the trained.
        mixture: how it was trained, to go on from here; None in adapters that were written before this was kept.
        sources: the experts, in the gates' order.
        dtype: the tensors'.
    """

    format: int
    method: str
    base_model_name_or_path: str
    base_sha256: str
    tokenizer_name: str | None
    task_name: str
    template: str
    labels: list[str]
    max_source_length: Count
    max_new_tokens: Count
    num_beams: Count
    reduction_factor: Count
    train_layer_norms: bool
    sources: list[SourceSettings]
    dtype: Dtype
    # older adapters of this format lack these two
    label_names: list[str] = field(default_factory=list)
    mixture: MixtureConfig | None = None


def source_settings(experts: Sequence[ExpertSource]) -> list[SourceSettings]:
    """The settings of experts, without their tensors."""
    return [
        SourceSettings(name=each.name, kind=each.kind, rank=each.rank, alpha=each.alpha)
        for each in experts
    ]


def write_adapter(
    folder: Path,
    settings: Settings,
    *,
    trained: Mapping[str, Tensor],
    experts: Sequence[ExpertSource],
) -> None:
    """Write both files into a folder that exists."""
    dtype = getattr(torch, settings.dtype)
    tensors = {f"{TRAINED}{name}": tensor for name, tensor in trained.items()}
    for k, expert in enumerate(experts):
        tensors |= {f"{EXPERT}{k}.{key}": tensor for key, tensor in expert.weights.items()}
        tensors[f"{EXPERT}{k}.{PROMPT}"] = expert.prompt_PD
    whole = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in whole.items():
        if not torch.isfinite(tensor).all():
            raise PemtError(
                f"tensor `{key}` has infinite or NaN values in {settings.dtype}; export in float32"
            )
    save_file(whole, folder / TENSORS, metadata={"format": "pt"})
    content = {"peft_type": PEFT_TYPE, **asdict(settings)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> Settings:
    """The settings of a published folder.

    Raises:
        PemtError: there is no such file, it is no PEMT's, of another version, lacks a key, or has a
            value of another kind or out of range.
    """
    path = folder / CONFIG
    found = read_json_object(path, missing=_no_adapter(folder))
    kind = found.get("peft_type")
    if kind != PEFT_TYPE:
        raise PemtError(
            f"{path}: peft_type: found {kind}, allowed is {PEFT_TYPE}; "
            "peft.PeftModel.from_pretrained loads adapters of its own types"
        )
    version, method = found.get("format"), found.get("method")
    if version != FORMAT or method not in METHODS:
        raise PemtError(
            f"{path}: found format {version} and method {method}, this version of pemt reads format {FORMAT} of "
            f"{', '.join(METHODS)}; a newer one may read it"
        )
    try:
        return checked(Settings, found)
    except ValueError as error:
        raise PemtError(f"{path}: {error}; export the run again") from None


def read_model(
    folder: Path, settings: Settings, base: PreTrainedModel
) -> tuple[TrainedT5, list[ExpertSource]]:
    """The adapted model, in the base's dtype, in evaluation mode; and the frozen experts in it.

    Args:
        base: of `settings.base_model_name_or_path`; changed in place.

    Raises:
        PemtError: the tensors are missing or damaged, or do not fit the base model.
        ModelError: the base is no T5, or an expert does not fit it.
    """
    checked = checked_base(base)
    if base_digest(checked) != settings.base_sha256:
        raise PemtError(
            f"{folder / CONFIG}: made for {settings.base_model_name_or_path} with other weights than the "
            "base model at hand; give the folder of the right one as base_model"
        )
    path = folder / TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PemtError(f"{path}: cannot be read: {error}; fetch it again") from None
    trained = _below(TRAINED, tensors)
    experts = [_source(path, k, each, tensors) for k, each in enumerate(settings.sources)]
    model = _untrained(path, settings, experts, trained, base)
    wanted = dict(model.trainable_parameters())
    wrong = sorted(wanted.keys() ^ trained.keys())
    wrong += [key for key in wanted if key in trained and wanted[key].shape != trained[key].shape]
    if wrong:
        raise PemtError(
            f"{path}: tensor `{TRAINED}{wrong[0]}` does not fit what {CONFIG} says; export the run again"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(trained[name])
    return model.eval(), experts


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of them."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors[name] for name in names}


def _untrained(
    path: Path,
    settings: Settings,
    experts: Sequence[ExpertSource],
    trained: Mapping[str, Tensor],
    base: PreTrainedModel,
) -> TrainedT5:
    if settings.method == "bitfit":
        return BitFitT5(base)
    if PROMPT_PARAMETER not in trained:
        raise PemtError(f"{path}: has no prompt; export the run again")
    return PemtT5.target(
        base,
        sources=experts,
        mixture=settings.mixture or MixtureConfig(train_layer_norms=settings.train_layer_norms),
        adapter=AdapterConfig(reduction_factor=settings.reduction_factor),
        prompt_PD=trained[PROMPT_PARAMETER],
    )


def _source(
    path: Path, k: int, settings: SourceSettings, tensors: Mapping[str, Tensor]
) -> ExpertSource:
    prefix = f"{EXPERT}{k}."
    weights = _below(prefix, tensors)
    if PROMPT not in weights:
        raise PemtError(f"{path}: has no tensor `{prefix}{PROMPT}`; export the run again")
    return ExpertSource(
        name=settings.name,
        kind=settings.kind,
        rank=settings.rank,
        alpha=settings.alpha,
        prompt_PD=weights.pop(PROMPT),
        weights=weights,
    )


def _no_adapter(folder: Path) -> str:
    if os.path.isfile(folder / "config.json"):
        return (
            f"{folder}: is a full model, not an adapter; load it with transformers' "
            "AutoModelForSeq2SeqLM.from_pretrained"
        )
    return f"{folder}: holds no {CONFIG}; give what `pemt export` wrote, or its id on the hub"
