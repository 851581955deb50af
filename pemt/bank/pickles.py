"""Files of tensors that `torch.save` wrote: pickles, of which only plain tensors are taken and no code is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pemt.bank.manifests import BankError
from pemt.model import refusal


def load_pickle(path: Path) -> Any:
    """What `torch.save` put into a file, on the CPU.

    Raises:
        BankError: it is missing, cut, would run code, or claims more numbers than it holds.
    """
    try:
        _check_unpacked(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BankError(f"{path}: does not exist") from None
    except pickle.UnpicklingError as error:
        raise BankError(
            f"{path}: refused: {refusal(error)}; only plain tensors are taken"
        ) from None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0] or "it ends too early"
        raise BankError(f"{path}: cannot be read: {reason}") from None
    for tensor in tensors_of(saved):
        if tensor.numel() * tensor.element_size() > path.stat().st_size:
            raise BankError(
                f"{path}: a tensor of shape {list(tensor.shape)} claims more numbers than the file holds"
            )
    return saved


def _check_unpacked(path: Path) -> None:
    """torch.save compresses nothing; what unpacks to more than the file was made to fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:
        raise BankError(
            f"{path}: would unpack to {size} bytes, and torch.save packs nothing; it is refused"
        )


def tensors_of(saved: Any) -> list[Tensor]:
    """The tensors of a dict, or the one that was saved alone."""
    values = saved.values() if isinstance(saved, Mapping) else [saved]
    return [value for value in values if isinstance(value, Tensor)]
