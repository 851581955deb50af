"""Reads a DeepSpeed JSON, refuses what DeepSpeed would swallow, fills in what `"auto"` leaves open.

DeepSpeed takes a key given twice, a misspelt section and `"stage": "2"` without a word; each of them
trains something other than what was meant. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from pemt.config.errors import PemtError
from pemt.config.json_file import read_json_object
from pemt.config.schema import RunConfig


class DeepSpeedConfigError(PemtError):
    """A DeepSpeed JSON that is malformed or contradicts the run's configuration."""


OWN = {
    "optimizer": "AdamW (learning_rate, weight_decay)",
    "scheduler": "schedule (lr_scheduler_type, warmup_steps)",
}
SECTIONS = (
    *("activation_checkpointing", "aio", "bf16", "comms_logger", "communication_data_type"),
    *("compile", "compression_training", "csv_monitor", "data_types", "disable_allgather"),
    *("dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping"),
    *("gradient_predivide_factor", "memory_breakdown", "prescale_gradients"),
    *("sequence_parallel_size", "sparse_gradients", "steps_per_print", "tensorboard"),
    *("torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu"),
    *("use_data_before_expert_parallelism", "wall_clock_breakdown"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"),
)

# DeepSpeed copies a frozen weight into an int8 tensor as it is, -0.3 as 0, next to scales of memory that was
# never written to, and casts what it has gathered to int8 again (0.19, partition_parameters.py).
KEPT_IN_INT8 = "zero_quantized_nontrainable_weights"


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration as a dict.

    Raises:
        DeepSpeedConfigError: unreadable, malformed, a key given twice, an unknown section, no ZeRO stage, or frozen
            weights to be kept in int8.
    """
    content = read_json_object(path, DeepSpeedConfigError)
    _check_sections(content, path)
    _check_zero(content, path)
    return content


def _check_sections(content: dict[str, Any], path: Path) -> None:
    for key, value in content.items():
        if key in ("optimizer", "scheduler"):  # which many a JSON of Hugging Face's has
            raise DeepSpeedConfigError(
                f"{path}: {key}: pemt brings its own {OWN[key]}; remove the section"
            )
        if key in ("bf16", "fp16", "zero_optimization") and not isinstance(value, dict):
            raise DeepSpeedConfigError(
                f"{path}: {key}: found {json.dumps(value)}, expected an object"
            )
        if key not in SECTIONS:
            raise DeepSpeedConfigError(
                f"{path}: unknown key `{key}`; allowed are {', '.join(SECTIONS)}"
            )


def _check_zero(content: dict[str, Any], path: Path) -> None:
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in range(4):
        raise DeepSpeedConfigError(
            f"{path}: zero_optimization.stage: found {json.dumps(stage)}, allowed are the numbers 0, 1, 2, 3"
        )
    kept_in_int8 = content["zero_optimization"].get(KEPT_IN_INT8, False)
    if kept_in_int8 is not False:
        raise DeepSpeedConfigError(
            f"{path}: zero_optimization.{KEPT_IN_INT8}: found {json.dumps(kept_in_int8)}, allowed is false: "
            "DeepSpeed 0.19 rounds frozen weights to integers before it scales them; remove the key, "
            "`zero_quantized_weights` alone sends them in int8"
        )


def launched_deepspeed_json(config: RunConfig) -> tuple[dict[str, Any], Path] | None:
    """The JSON that `accelerate launch` was given, filled in for this run, and its file; None without DeepSpeed.

    Raises:
        DeepSpeedConfigError: there is none, or as `read_deepspeed_json` and `fill_deepspeed_json`.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return None
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if name is None:
        raise DeepSpeedConfigError(
            "accelerate launch: no DeepSpeed JSON; give one with --deepspeed_config_file ds_configs/zero2.json"
        )
    path = Path(name).expanduser()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    content = read_deepspeed_json(path)
    return fill_deepspeed_json(content, config, world_size=world_size, path=path), path


def fill_deepspeed_json(
    content: dict[str, Any], config: RunConfig, *, world_size: int, path: Path
) -> dict[str, Any]:
    """The same configuration with every value of the run set, none left to `"auto"`.

    Args:
        content: what `read_deepspeed_json` gave; it is not changed.
        config: the run's configuration, which decides wherever the JSON says `"auto"` or nothing.
        world_size: number of ranks.
        path: the JSON's name, for errors.

    Raises:
        DeepSpeedConfigError: the JSON and the configuration give different values for the same thing, or the
            JSON switches off a guard.
    """
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    run_values: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (micro, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "gradient_accumulation_steps"),
        "train_batch_size": (micro * accumulation * world_size, "ranks x batch x accumulation"),
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "bf16.enabled": (config.bf16, "bf16"),
        "fp16.enabled": (config.fp16, "fp16"),
    }
    filled = copy.deepcopy(content)
    for key, (value, field) in run_values.items():
        section = filled
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:  # bf16, before the ranks know what their devices compute in
            continue
        found = section.get(last, "auto")
        if found not in ("auto", value):
            raise DeepSpeedConfigError(
                f"{path}: {key} is {json.dumps(found)}, but this run's {field} is {json.dumps(value)}; "
                f'write "auto" into the JSON, or make the two agree'
            )
        section[last] = value
    _check_guards(filled, path)
    return filled


def _check_guards(filled: dict[str, Any], path: Path) -> None:
    """Refuse to switch off what tells DeepSpeed of a gradient that is not finite: it would go into the weights."""
    for section, key in (
        ("bf16", "check_grad_overflow"),
        ("zero_optimization", "compute_grad_norm"),
    ):
        if filled[section].get(key, True) is not True:
            raise DeepSpeedConfigError(
                f"{path}: {section}.{key}: found {json.dumps(filled[section][key])}; a gradient of NaN would go "
                "unseen into the weights; remove the key"
            )
