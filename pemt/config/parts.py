"""The sections of a configuration: expert, adapter, mixture; and the trackers there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TENSORBOARD = "tensorboard"
TRACKER_RUNS = "trackers.json"  # in a run's folder: tracker -> the run that it has opened there
# What accelerate has trackers for.
TRACKERS = (
    *(TENSORBOARD, "wandb", "mlflow", "trackio", "comet_ml"),
    *("aim", "clearml", "dvclive", "swanlab"),
)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """The expert that stage 1 trains.

    Args:
        kind: `lora` (the paper's default) or `bottleneck`.
        target_modules: the linear layers that a LoRA is on, as PEFT names them: a list of q, k, v, o, wi, wi_0, wi_1
            and wo (those of self-attention, cross-attention and FFNs), a regular expression over whole module names,
            or `all-linear`. As published: wo, the FFNs' output projection; a bottleneck is there alone. In T5Gemma
            these mean its q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj, which are taken too.
        rank: LoRA rank R.
        alpha: LoRA scaling numerator; the expert's output is multiplied by alpha / rank.
        reduction_factor: a bottleneck expert's inner width is d_ff // reduction_factor.
    """

    kind: Literal["lora", "bottleneck"] = "lora"
    target_modules: list[str] | str = field(default_factory=lambda: ["wo"])
    rank: int = 64
    alpha: float = 64.0
    reduction_factor: int = 48


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The target adapter of stage 2.

    Args:
        reduction_factor: the adapter's inner width is d_model // reduction_factor.
    """

    reduction_factor: int = 16


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How stage 2 mixes the frozen experts.

    Args:
        gate: `learned`, as published; `uniform`: every expert of a site has the same weight, and nothing is trained in
            the gates, as a control.
        top_sources: of the chosen experts, mix only this many, those whose prompts are most like the target task's
            (cosine of the means over tokens), chosen before training; default: all.
        sparsity_loss_weight: weight of the task sparsity loss beside the cross-entropy.
        sparsity_over_padding: average the sparsity loss over padding too, as the published code does;
            false averages over real tokens only.
        prompt_dropout: dropout on the attention of the target prompt over each source prompt.
        train_layer_norms: train every layer norm of the base model along with the adapters.
    """

    gate: Literal["learned", "uniform"] = "learned"
    top_sources: int | None = None
    sparsity_loss_weight: float = 0.1
    sparsity_over_padding: bool = True
    prompt_dropout: float = 0.1
    train_layer_norms: bool = True
