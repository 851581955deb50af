"""The files of an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, or `.bin`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pemt.bank.manifests import BankError
from pemt.bank.pickles import load_pickle

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # what PEFT once wrote; read where there is no other
# Not PEFT's: our task prompt, beside its files, so that nothing is lost on the way out and back.
PROMPT_FILE, PROMPT = "pemt_prompt.safetensors", "prompt"
CARD = "README.md"
FILES = (CONFIG, TENSORS, PICKLED, PROMPT_FILE, CARD)


def load_adapter(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter's file of tensors, and what it holds.

    Raises:
        BankError: there is none, or it is damaged, would run code or holds something else.
    """
    path = folder / TENSORS
    if not path.exists() and (folder / PICKLED).is_file():
        path = folder / PICKLED
        saved = load_pickle(path)
        if not isinstance(saved, Mapping) or not all(map(_is_plain, saved.values())):
            raise BankError(f"{path}: found something else than a dict of plain tensors")
        return path, {str(key): tensor.detach() for key, tensor in saved.items()}
    try:
        return path, load_file(path)
    except FileNotFoundError:
        raise BankError(f"{path}: does not exist, and no {PICKLED} either") from None
    except (OSError, SafetensorError) as error:
        raise BankError(f"{path}: cannot be read: {error}") from None


def _is_plain(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and value.is_floating_point() and value.device.type == "cpu"


def read_prompt(folder: Path) -> Tensor | None:
    """The task prompt [P,D] beside an adapter, if there is one.

    Raises:
        BankError: it cannot be read.
    """
    path = folder / PROMPT_FILE
    if not path.is_file():
        return None
    try:
        return load_file(path)[PROMPT].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise BankError(f"{path}: cannot be read: {error}") from None
