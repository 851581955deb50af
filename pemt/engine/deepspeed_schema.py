"""Holds a DeepSpeed JSON's inner keys against DeepSpeed's own schema, before anything is started.

DeepSpeed's models refuse an unknown key with a page of pydantic, and turn "2" into 2 and `true` into 1
without a word. Here each key is looked up in the same models, strictly, and the first that is wrong
gives one line.
"""

from __future__ import annotations

import pemt.engine.deepspeed_import  # noqa: F401

import json
import math
from pathlib import Path
from typing import Annotated, Any, get_args

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pemt.config import DeepSpeedConfigError, nearest

MODELS: dict[str, type[DeepSpeedConfigModel]] = {
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "csv_monitor": CSVConfig,
    "fp16": DeepSpeedFP16Config,
    "tensorboard": TensorBoardConfig,
    "zero_optimization": DeepSpeedZeroConfig,
}
# Sections that DeepSpeed reads key by key; it passes over any other key.
PLAIN_KEYS: dict[str, tuple[str, ...]] = {
    "activation_checkpointing": tuple(ACT_CHKPT_DEFAULT),
    "aio": tuple(AIO_DEFAULT_DICT),
    "data_types": ("grad_accum_dtype",),
    "flops_profiler": tuple(vars(DeepSpeedFlopsProfilerConfig({}))),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
}


def check_schema(content: dict[str, Any], path: Path) -> None:
    """Refuse an inner key or value that DeepSpeed would refuse, pass over or bend.

    Args:
        content: a DeepSpeed configuration with nothing left to `"auto"` that the run fills in.
        path: the JSON's name, for errors.

    Raises:
        DeepSpeedConfigError: an unknown key, a value of another type or out of range, `"auto"` where
            nothing fills it in, or values that do not go together.
    """
    for section, keys in PLAIN_KEYS.items():
        found = _mapping(content.get(section, {}), section, path)
        for key in found:
            if key not in keys:
                raise _unknown(f"{section}.{key}", [f"{section}.{each}" for each in keys], path)
    for section, model in MODELS.items():
        if section in content:
            _check_model(model, _mapping(content[section], section, path), section, path)
    try:
        DeepSpeedZeroConfig(**content["zero_optimization"])
    except (ValidationError, AssertionError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DeepSpeedConfigError(f"{path}: zero_optimization: {problem}") from None


def _check_model(
    model: type[DeepSpeedConfigModel], found: dict[str, Any], where: str, path: Path
) -> None:
    known = {field.alias or name: field for name, field in model.model_fields.items()}
    known |= dict(model.model_fields)
    for key, value in found.items():
        name = f"{where}.{key}"
        if key not in known:
            raise _unknown(name, [f"{where}.{each}" for each in known], path)
        if value == "auto":
            raise DeepSpeedConfigError(
                f'{path}: {name}: found "auto", which nothing fills in there; '
                "write a value, or leave the key out for DeepSpeed's own"
            )
        inner = _inner_model(known[key].annotation)
        if inner and value is not None:
            _check_model(inner, _mapping(value, name, path), name, path)
        else:
            _check_value(known[key], value, name, path)


def _check_value(field: FieldInfo, value: Any, name: str, path: Path) -> None:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)  # 5e8 is how people write bucket sizes
    kind: Any = field.annotation
    for rule in field.metadata:
        kind = Annotated[kind, rule]
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Input ")
        raise DeepSpeedConfigError(
            f"{path}: {name}: found {json.dumps(value)}, it {problem}"
        ) from None


def _inner_model(annotation: Any) -> type[DeepSpeedConfigModel] | None:
    """The configuration model in `X` or `Optional[X]`."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, DeepSpeedConfigModel):
            return each
    return None


def _mapping(value: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DeepSpeedConfigError(f"{path}: {name}: found {json.dumps(value)}, expected an object")
    return value


def _unknown(name: str, known: list[str], path: Path) -> DeepSpeedConfigError:
    hint = nearest(name, known, what=f"allowed are {', '.join(known)}")
    return DeepSpeedConfigError(f"{path}: unknown key `{name}`{hint}")
