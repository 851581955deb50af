"""A base model built around its weight files: nothing is read but their tables of contents.

Every rank of a node maps the same files, so the node's page cache reads each byte from disk once.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from pemt.config import PemtError
from pemt.model.lazy import lazy_parameter


class BaseModelError(PemtError):
    """A base model that cannot be loaded, is of no family in `families`, or does not go with the tokenizer."""


FLOATS = ("F32", "BF16", "F16", "F64")  # as safetensors calls them
# A tensor's shape, and what reads it.
Entry = tuple[tuple[int, ...], Callable[[], Tensor]]


def lazy_base(name: str, config: PreTrainedConfig) -> PreTrainedModel | None:
    """The base model with all its parameters lazy, fp32 by name, in evaluation mode.

    Args:
        name: hub id or folder.
        config: its configuration.

    Returns:
        None where its files cannot be mapped: there are none, or they are of torch's format before 1.6.

    Raises:
        BaseModelError: a tensor is missing, or of another shape than the configuration says.
        OSError, SafetensorError: a file is unreadable or cut short.
    """
    files = weight_files(name)
    if files is None:
        return None
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            entries.update(_entries(file))
        except (RuntimeError, pickle.UnpicklingError):
            return None
    with torch.device("meta"):
        base = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    _install_lazy(base, entries, name)
    return base.eval()


def weight_files(name: str) -> list[Path] | None:
    """The files that hold a model's weights, downloaded where they must be; None where there are none."""
    find = partial(cached_file, name, _raise_exceptions_for_missing_entries=False)
    for single, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if (found := find(single)) is not None:
            return [Path(found)]
        if (found := find(index)) is not None:
            return [Path(str(cached_file(name, part))) for part in _parts(Path(found))]
    return None


def _parts(index: Path) -> list[str]:
    """The files that a sharded model's index names, all in its own folder."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        parts = sorted(set(listed))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BaseModelError(f"{index}: cannot be read as an index of weights: {error}") from None
    for part in parts:
        if not isinstance(part, str) or Path(part).name != part or not part:
            raise BaseModelError(
                f"{index}: weight_map: found `{part}`, which is no plain file name"
            )
    return parts


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 it is no mapping
                tensor = opened.get_slice(key)
                if tensor.get_dtype() not in FLOATS:
                    raise BaseModelError(
                        f"model_name_or_path: {file}: tensor `{key}` holds {tensor.get_dtype()}, needed is one of "
                        f"{', '.join(FLOATS)}; a quantized model cannot be trained on: give the one it was made from"
                    )
                shape = tuple(tensor.get_shape())
                yield key, (shape, partial(_read_safetensors, file, key))
        return
    mapped = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    for key, tensor in mapped.items():
        yield key, (tuple(tensor.shape), partial(mapped.__getitem__, key))


def _read_safetensors(file: Path, key: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(key)


def _install_lazy(base: PreTrainedModel, entries: dict[str, Entry], name: str) -> None:
    """Exchange every parameter on `meta` for a lazy one; tied ones stay tied where their values agree."""
    for module in base.modules():
        _make_buffers(module)
    assert not any(buffer.is_meta for buffer in base.buffers()), "a buffer on meta needs a value"
    tied: dict[int, list[str]] = {}
    for key, parameter in base.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(key)
    lazy: dict[str, nn.Parameter] = {}
    for keys in tied.values():
        stored = [key for key in keys if key in entries] or keys[:1]
        shape = tuple(base.get_parameter(keys[0]).shape)
        for key in stored:
            found, read = entries.get(key, (None, None))
            if read is None or found != shape:
                raise BaseModelError(
                    f"model_name_or_path: `{name}`: tensor `{key}` is {'missing' if found is None else list(found)} "
                    f"in its weight files, its config.json needs {list(shape)}; give a complete model"
                )
            if key == stored[0]:
                lazy |= dict.fromkeys(keys, lazy_parameter(shape, torch.float32, read))
            # transformers ties every T5, and unties those whose files hold two different tensors: T5 v1.1.
            elif not torch.equal(entries[stored[0]][1](), read()):
                lazy[key] = lazy_parameter(shape, torch.float32, read)
                base.all_tied_weights_keys.pop(key, None)
    for key, parameter in lazy.items():
        owner, _, attribute = key.rpartition(".")
        setattr(base.get_submodule(owner), attribute, parameter)


def _make_buffers(module: nn.Module) -> None:
    """Values for what a module computes from its configuration and no file holds: a rotary embedding's frequencies."""
    if own := dict(module.named_buffers(recurse=False)):
        made: Any = type(module)(config=module.config)
        for name in own:
            setattr(module, name, made.get_buffer(name))


def refusal(error: pickle.UnpicklingError) -> str:
    """What the restricted unpickler objected to, out of its long advice."""
    blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if blocked:
        return f"it would call {blocked[1]} when loaded"
    return "it is no file of tensors that torch.save wrote"
