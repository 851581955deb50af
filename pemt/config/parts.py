"""The sections of a configuration: expert, adapter, mixture; and the trackers there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TENSORBOARD = "tensorboard"
# What accelerate has trackers for.
TRACKERS = (
    *(
        TENSORBOARD,
        "wandb",
        "mlflow",
        "trackio",
        "comet_ml",
        "aim",
        "clearml",
        "dvclive",
        "swanlab",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """The expert that stage 1 trains on every FFN's output projection.

    Args:
        kind: `lora` (the paper's default) or `bottleneck`.
        rank: LoRA rank R.
        alpha: LoRA scaling numerator; the expert's output is multiplied by alpha / rank.
        reduction_factor: a bottleneck expert's inner width is d_ff // reduction_factor.
    """

    kind: Literal["lora", "bottleneck"] = "lora"
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
        sparsity_loss_weight: weight of the task sparsity loss beside the cross-entropy.
        sparsity_over_padding: average the sparsity loss over padding too, as the published code does;
            false averages over real tokens only.
        prompt_dropout: dropout on the attention of the target prompt over each source prompt.
        train_layer_norms: train every T5 layer norm along with the adapters.
    """

    sparsity_loss_weight: float = 0.1
    sparsity_over_padding: bool = True
    prompt_dropout: float = 0.1
    train_layer_norms: bool = True
