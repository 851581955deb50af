"""Our models with the weights of a golden file, and the published names of their parameters.

The format is told in `../shared/golden/README.md`. Shapes: P prompt tokens, D d_model, F d_ff, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from pemt.config import AdapterConfig, ExpertConfig, MixtureConfig
from pemt.model import ExpertSource, PemtT5
from pemt.model.inject import ffn_sites

STAGES = ("stage1", "stage2", "stage1_bottleneck", "stage2_bottleneck")
ADAPTERS = "adapter_controller.adapters"


@dataclass(frozen=True)
class Golden:
    """One file in memory."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path | str) -> Golden:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return cls(json.loads(file.metadata()["config"]), tensors)

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {
            key[len(prefix) :]: tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.under("inputs.")

    @property
    def stages(self) -> list[str]:
        return [stage for stage in STAGES if f"{stage}.out.loss" in self.tensors]


@dataclass(frozen=True)
class GoldenModel:
    """Our model of one stage in evaluation mode, and published name → our parameter."""

    model: PemtT5
    published: dict[str, nn.Parameter]


def build(golden: Golden, stage: str, order: Sequence[int] | None = None) -> GoldenModel:
    """Our model of this stage with the file's weights; `order` permutes the experts against their names."""
    parameters = golden.under(f"{stage}.param.")
    base = golden_base(golden.config, parameters)
    prompt_PD = parameters["task_shared"]
    if stage.startswith("stage1"):
        model = _stage1(golden, stage, base, prompt_PD)
    else:
        kind = "bottleneck" if stage.endswith("bottleneck") else "lora"
        sources = _sources(golden, kind, parameters, base)
        if order is not None:
            sources = [
                _with_prompt(sources[i], source) for i, source in zip(order, sources, strict=True)
            ]
        model = PemtT5.target(
            base,
            sources=sources,
            mixture=MixtureConfig(sparsity_loss_weight=golden.config["tsl_weight"]),
            adapter=AdapterConfig(reduction_factor=golden.config["reduction_factor"]),
            prompt_PD=prompt_PD,
        )
    published = published_names(model, parameters)
    with torch.no_grad():
        for name, parameter in published.items():
            parameter.copy_(parameters[name])
    return GoldenModel(model.eval(), published)


def golden_base(
    config: dict[str, Any], parameters: dict[str, Tensor]
) -> T5ForConditionalGeneration:
    """A stock T5 with the published base weights, its head untied where the file's head differs."""
    known = {field.name for field in fields(T5Config)}
    known |= {"tie_word_embeddings", "decoder_start_token_id"}
    base = T5ForConditionalGeneration(
        T5Config(**{key: config[key] for key in config if key in known})
    )
    if not torch.equal(parameters["lm_head.weight"], parameters["shared.weight"]):
        base.lm_head.weight = nn.Parameter(parameters["lm_head.weight"].clone())
    state = base.state_dict()
    missing = sorted(state.keys() - parameters.keys())
    assert not missing, f"the file lacks the base model's {missing}"
    base.load_state_dict({key: parameters[key] for key in state})
    return base


def published_names(model: PemtT5, parameters: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Published name → our parameter, for everything that either side trains."""
    names = {"task_shared": model.prompt.prompt}
    for site, place in zip(ffn_sites(model.base), _places(model.base), strict=True):
        wo, dense = site.dense.wo, f"{place}.DenseReluDense"
        if hasattr(wo, "expert") and f"{dense}.wo.lora_A" in parameters:
            names |= {f"{dense}.wo.lora_A": wo.expert.down, f"{dense}.wo.lora_B": wo.expert.up}
        elif hasattr(wo, "expert"):
            names |= _adapter_names(f"{dense}.{ADAPTERS}", parameters, wo.expert)
        else:
            gate = f"{dense}.wo.w_gate" if f"{dense}.wo.w_gate" in parameters else f"{dense}.w_gate"
            names |= {gate: wo.gate.weight}
            names |= _adapter_names(f"{place}.{ADAPTERS}", parameters, wo.adapter)
    if model.mixture is not None:
        norms = {id(parameter) for _, parameter in model.trainable_parameters()}
        names |= {
            name: parameter
            for name, parameter in model.base.named_parameters()
            if name in parameters and id(parameter) in norms
        }
    return names


def _stage1(
    golden: Golden, stage: str, base: T5ForConditionalGeneration, prompt_PD: Tensor
) -> PemtT5:
    if stage == "stage1":
        expert = ExpertConfig(
            kind="lora", rank=golden.config["lora_rank"], alpha=golden.config["lora_alpha"]
        )
        return PemtT5.source(base, expert=expert, prompt_PD=prompt_PD)
    inner = next(
        tensor.shape[0]
        for key, tensor in golden.under(f"{stage}.param.").items()
        if key.endswith("down_sampler.weight")
    )
    expert = ExpertConfig(kind="bottleneck", reduction_factor=base.config.d_ff // inner)
    return PemtT5.source(base, expert=expert, prompt_PD=prompt_PD)


def _sources(
    golden: Golden, kind: str, parameters: dict[str, Tensor], base: T5ForConditionalGeneration
) -> list[ExpertSource]:
    sites, places = ffn_sites(base), _places(base)
    pairs = [
        (site.name, f"{place}.DenseReluDense") for site, place in zip(sites, places, strict=True)
    ]
    sources = []
    names = _adapter_tasks(parameters, f"{pairs[0][1]}.{ADAPTERS}.")
    for k in range(golden.config["experts"]):
        weights = {}
        for site, dense in pairs:
            if kind == "lora":
                weights[f"{site}.down"] = parameters[f"{dense}.wo.lora_A.{k}"]
                weights[f"{site}.up"] = parameters[f"{dense}.wo.lora_B.{k}"]
                continue
            for ours, theirs in (("down", "down_sampler"), ("up", "up_sampler")):
                for part in ("weight", "bias"):
                    weights[f"{site}.{ours}.{part}"] = parameters[
                        f"{dense}.{ADAPTERS}.{names[k]}.{theirs}.{part}"
                    ]
        down = weights["encoder.0.down" if kind == "lora" else "encoder.0.down.weight"]
        sources.append(
            ExpertSource(
                name=f"source{k}",
                kind=kind,
                rank=down.shape[0],
                alpha=golden.config["lora_alpha"],
                weights=weights,
                prompt_PD=parameters[f"task_list.{k}"],
            )
        )
    return sources


def _with_prompt(source: ExpertSource, other: ExpertSource) -> ExpertSource:
    return ExpertSource(
        name=other.name,
        kind=source.kind,
        rank=source.rank,
        alpha=source.alpha,
        weights=source.weights,
        prompt_PD=other.prompt_PD,
    )


def _adapter_tasks(parameters: dict[str, Tensor], prefix: str) -> list[str]:
    found = (
        re.match(re.escape(prefix) + r"(.+)\.down_sampler\.weight$", key) for key in parameters
    )
    return sorted(match[1] for match in found if match)


def _adapter_names(
    prefix: str, parameters: dict[str, Tensor], module: Any
) -> dict[str, nn.Parameter]:
    (task,) = _adapter_tasks(parameters, f"{prefix}.")
    return {
        f"{prefix}.{task}.{theirs}.{part}": getattr(getattr(module, ours), part)
        for ours, theirs in (("down", "down_sampler"), ("up", "up_sampler"))
        for part in ("weight", "bias")
    }


def _places(base: T5ForConditionalGeneration) -> list[str]:
    """Published module path of every FFN layer, in the order of `ffn_sites`."""
    encoder = [f"encoder.block.{i}.layer.1" for i in range(base.config.num_layers)]
    return encoder + [f"decoder.block.{i}.layer.2" for i in range(base.config.num_decoder_layers)]
