"""What `pemt bank` does to a bank beside listing it: export to PEFT, verify, remove."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from pemt.bank.entries import read_entry
from pemt.bank.manifests import TENSORS, BankError, entry_folder, entry_names
from pemt.bank.peft_format import write_peft
from pemt.config import PemtError
from pemt.storage import MANIFEST, TEMPORARY


def export_peft(
    bank_dir: str | Path, folder: str | Path, *, tasks: Sequence[str] | None = None
) -> list[Path]:
    """Write LoRA sources of a bank so that `peft.PeftModel.from_pretrained` loads each.

    Args:
        bank_dir: the bank.
        folder: receives one folder per source, by its name.
        tasks: which; default: every LoRA source.

    Raises:
        BankError: no such entry, no LoRA source at all, a named one is none, or its folder is not empty.
    """
    entries = [read_entry(path) for path in _entries(bank_dir, tasks)]
    if tasks is None:
        entries = [entry for entry in entries if entry[0].kind == "lora"]
    if not entries:
        raise BankError(f"{bank_dir}: has no lora source, and PEFT knows no other kind of ours")
    return [
        write_peft(
            Path(folder) / source.name,
            source,
            base_name=str(manifest.base["name"]),
            shape=manifest.base,
        )
        for manifest, source in entries
    ]


def verify(bank_dir: str | Path, tasks: Sequence[str] | None = None) -> dict[str, str | None]:
    """By entry what is wrong with it, or None: checksums, shapes, and that every value is finite."""
    return {folder.name: _fault(folder) for folder in _entries(bank_dir, tasks)}


def remove(bank_dir: str | Path, tasks: Sequence[str]) -> list[str]:
    """Take entries out of a bank; nothing is removed unless all of them are there.

    Returns:
        Their names, each once.

    Raises:
        BankError: no such entry.
    """
    folders = _entries(bank_dir, tasks)
    for folder in folders:
        # first out of sight in one step: a removal that is cut short leaves no half entry
        hidden = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)
    return [folder.name for folder in folders]


def _entries(bank_dir: str | Path, tasks: Sequence[str] | None) -> list[Path]:
    names = entry_names(bank_dir)
    for task in tasks or ():
        if task not in names:
            raise BankError(f"{bank_dir}: has no entry `{task}`; it has: {', '.join(names)}")
    return [entry_folder(bank_dir, name) for name in dict.fromkeys(tasks or names)]


def _fault(folder: Path) -> str | None:
    try:
        manifest, source = read_entry(folder)
        source.check(manifest.base)
    except PemtError as error:
        return str(error)
    except KeyError as error:
        return f"{folder / MANIFEST}: base: lacks {error}"
    for key, tensor in source.weights.items():
        if not torch.isfinite(tensor).all():
            return f"{folder / TENSORS}: tensor `{key}` has infinite or NaN values"
    return None
