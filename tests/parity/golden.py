"""A golden file (the format is told in its folder's README.md), and our model with its weights."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from pemt.config.schema import AdapterConfig, ExpertConfig, MixtureConfig
from pemt.model import ExpertSource, PemtT5
from tests.support.tiny_t5 import ffn_sites

STAGES = ("stage1", "stage2", "stage1_bottleneck", "stage2_bottleneck")
ADAPTERS = "adapter_controller.adapters"
MOST_SEARCHED = 6  # experts; 720 orders take some 20 s on a tiny model


class GoldenError(ValueError):
    """A file that is not of the golden format; the text is one line."""


@dataclass(frozen=True)
class Golden:
    """One file in memory."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | Path) -> Golden:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise GoldenError(f"{path}: cannot be read: {error}") from None
        if "config" not in metadata:
            raise GoldenError(f"{path}: its metadata has no `config`")
        golden = cls(json.loads(metadata["config"]), tensors)
        if not golden.stages:
            raise GoldenError(f"{path}: holds none of the stages {', '.join(STAGES)}")
        if golden.config["non_linearity"] != "gelu_new":
            found = golden.config["non_linearity"]
            raise GoldenError(f"{path}: non_linearity: found {found}, adapters here have gelu_new")
        return golden

    def under(self, prefix: str) -> dict[str, Tensor]:
        cut = len(prefix)
        return {key[cut:]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.under("inputs.")

    @property
    def stages(self) -> list[str]:
        return [stage for stage in STAGES if f"{stage}.out.loss" in self.tensors]


@dataclass(frozen=True)
class GoldenModel:
    """Our model of one stage in evaluation mode, and published name → our trained parameter."""

    model: PemtT5
    published: dict[str, nn.Parameter]


def build(golden: Golden, stage: str, order: Sequence[int] | None = None) -> GoldenModel:
    """Our model of a stage with the file's weights; `order` is as in `expert_orders`."""
    parameters = golden.under(f"{stage}.param.")
    base = golden_base(golden.config, parameters)
    if stage.startswith("stage1"):
        expert = _expert_config(golden, stage, base.config.d_ff)
        model = PemtT5.source(base, expert=expert, prompt_PD=parameters["task_shared"])
    else:
        model = PemtT5.target(
            base,
            sources=_sources(golden, stage, parameters, base, order),
            mixture=MixtureConfig(sparsity_loss_weight=golden.config["tsl_weight"]),
            adapter=AdapterConfig(reduction_factor=golden.config["reduction_factor"]),
            prompt_PD=parameters["task_shared"],
        )
    published = _published_names(model, parameters)
    with torch.no_grad():
        for name, parameter in published.items():
            parameter.copy_(parameters[name])
    return GoldenModel(model.eval(), published)


def golden_base(
    config: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> T5ForConditionalGeneration:
    """A stock T5 with the file's base weights; its head untied where the file's differs."""
    known = {field.name for field in fields(T5Config)}
    known |= {"tie_word_embeddings", "decoder_start_token_id"}
    kept = {key: value for key, value in config.items() if key in known}
    base = T5ForConditionalGeneration(T5Config(**kept))
    if not torch.equal(parameters["lm_head.weight"], parameters["shared.weight"]):
        base.lm_head.weight = nn.Parameter(parameters["lm_head.weight"].clone())
    base.load_state_dict({key: parameters[key] for key in base.state_dict()})
    return base


def expert_orders(golden: Golden, stage: str) -> Iterator[list[int] | None]:
    """The orders that a stage's experts may be in; None: as the file says.

    Bottleneck experts go by their task's name alone: expert k is the one at place order[k] of the
    sorted names. Beyond `MOST_SEARCHED` experts only the sorted order is offered.
    """
    experts = golden.config["experts"]
    if stage != "stage2_bottleneck":
        yield None
    elif experts > MOST_SEARCHED:
        yield list(range(experts))
    else:
        yield from (list(order) for order in itertools.permutations(range(experts)))


def _expert_config(golden: Golden, stage: str, d_ff: int) -> ExpertConfig:
    if stage == "stage1":
        rank, alpha = golden.config["lora_rank"], golden.config["lora_alpha"]
        return ExpertConfig(kind="lora", rank=rank, alpha=alpha)
    key = rf"encoder\.block\.0\.layer\.1\.DenseReluDense\.{ADAPTERS}\..+\.down_sampler\.weight"
    (down,) = (
        value for name, value in golden.under(f"{stage}.param.").items() if re.fullmatch(key, name)
    )
    return ExpertConfig(kind="bottleneck", reduction_factor=d_ff // len(down))


def _sources(
    golden: Golden,
    stage: str,
    parameters: Mapping[str, Tensor],
    base: T5ForConditionalGeneration,
    order: Sequence[int] | None,
) -> list[ExpertSource]:
    sites = {site.name: f"{place}.DenseReluDense" for site, place in _places(base)}
    tasks = _adapter_tasks(parameters, f"{sites['encoder.0']}.{ADAPTERS}.")
    sources = []
    for k in range(golden.config["experts"]):
        if stage == "stage2":
            weights = {
                f"{site}.{ours}": parameters[f"{dense}.wo.{theirs}.{k}"]
                for site, dense in sites.items()
                for ours, theirs in (("down", "lora_A"), ("up", "lora_B"))
            }
        else:
            task = tasks[k if order is None else order[k]]
            weights = {
                f"{site}.{ours}": parameters[f"{dense}.{ADAPTERS}.{task}.{theirs}"]
                for site, dense in sites.items()
                for ours, theirs in _ADAPTER_PARTS.items()
            }
        source = ExpertSource(
            name=f"source{k}",
            kind="lora" if stage == "stage2" else "bottleneck",
            rank=len(weights["encoder.0.down" if stage == "stage2" else "encoder.0.down.weight"]),
            alpha=golden.config["lora_alpha"],
            weights=weights,
            prompt_PD=parameters[f"task_list.{k}"],
        )
        sources.append(source)
    return sources


_ADAPTER_PARTS = {
    f"{ours}.{part}": f"{theirs}.{part}"
    for ours, theirs in (("down", "down_sampler"), ("up", "up_sampler"))
    for part in ("weight", "bias")
}


def _published_names(model: PemtT5, parameters: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    names = {"task_shared": model.prompt.prompt}
    for site, place in _places(model.base):
        wo, dense = site.module, f"{place}.DenseReluDense"
        if model.expert is None:
            (gate,) = {f"{dense}.wo.w_gate", f"{dense}.w_gate"} & parameters.keys()
            names[gate] = wo.gate.weight
            names |= _adapter_names(f"{place}.{ADAPTERS}.", parameters, wo.adapter)
        elif model.expert.kind == "lora":
            names |= {f"{dense}.wo.lora_A": wo.expert.down, f"{dense}.wo.lora_B": wo.expert.up}
        else:
            names |= _adapter_names(f"{dense}.{ADAPTERS}.", parameters, wo.expert)
    for name, parameter in model.base.named_parameters():
        if name in parameters and parameter.requires_grad:
            names[name] = parameter
    return names


def _adapter_names(
    prefix: str, parameters: Mapping[str, Tensor], module: nn.Module
) -> dict[str, nn.Parameter]:
    (task,) = _adapter_tasks(parameters, prefix)
    ours = dict(module.named_parameters())
    return {f"{prefix}{task}.{theirs}": ours[name] for name, theirs in _ADAPTER_PARTS.items()}


def _adapter_tasks(parameters: Mapping[str, Tensor], prefix: str) -> list[str]:
    end = ".down_sampler.weight"
    return sorted(
        key[len(prefix) : -len(end)]
        for key in parameters
        if key.startswith(prefix) and key.endswith(end)
    )


def _places(base: Any) -> Iterator[tuple[Any, str]]:
    """Every FFN site with its layer's published path."""
    for site in ffn_sites(base):
        yield site, site.spec.module.removesuffix(".DenseReluDense.wo")
