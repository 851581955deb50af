"""The expert bank: what stage 1 leaves and stage 2 reads.

`bank_dir/<task>/` holds `expert.safetensors` (the expert's tensors, and the prompt) and
`manifest.json`: which task and base model it belongs to, how it was made, and checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pemt.bank.manifests import (
    FORMAT,
    PROMPT,
    TENSORS,
    BankError,
    Manifest,
    check_free,
    chosen_entries,
    entry_folder,
    last_part,
    manifest_of,
)
from pemt.bank.official import read_official
from pemt.config import installed_version
from pemt.model import ExpertSource, ModelError, sites_of
from pemt.storage import MANIFEST, open_tensors, tensor_writer, write_folders


def write_entry(
    bank_dir: str | Path,
    source: ExpertSource,
    *,
    base: Mapping[str, Any],
    description: str | None,
    metrics: Mapping[str, float],
    origin: str | None = None,
    licence: str | None = None,
    write: Callable[[Mapping[Path, Callable[[Path], None]]], None] = write_folders,
) -> Path:
    """Write one entry atomically; an older one of the same task is replaced.

    Args:
        bank_dir: the bank, made if it does not exist.
        source: expert and prompt.
        base: `name` of the base model, and its `base_shape`.
        description, metrics, origin, licence: see `Manifest`.
        write: is given the entry's folder and what fills it. Of several that are to be there together or not at all
            these are collected for one `write_folders`.

    Returns:
        The entry's folder.

    Raises:
        BankError: the task's name cannot be a folder's, or a tensor is not finite.
        ModelError: the expert does not fit that base model.
        StorageError: it cannot be written.
    """
    folder = entry_folder(bank_dir, source.name)
    source.check(base)
    tensors = _finite(folder, source)
    manifest = Manifest(
        format=FORMAT,
        task=source.name,
        description=description,
        base=dict(base),
        base_sha256=source.base_sha256,
        kind=source.kind,
        rank=source.rank,
        alpha=source.alpha,
        dtype="float32",
        metrics=dict(metrics),
        versions=_versions(),
        origin=origin,
        licence=licence,
    )
    write({folder: tensor_writer({TENSORS: tensors}, asdict(manifest))})
    return folder


def _finite(folder: Path, source: ExpertSource) -> dict[str, Tensor]:
    """What an entry stores, in float32."""
    tensors = {**source.weights, PROMPT: source.prompt_PD}
    for key, tensor in tensors.items():
        tensors[key] = tensor.detach().cpu().float()
        if not torch.isfinite(tensors[key]).all():
            raise BankError(
                f"{folder}: not written: tensor `{key}` has infinite or NaN values in float32; "
                "the training diverged, lower learning_rate"
            )
    return tensors


def read_entry(path: str | Path) -> tuple[Manifest, ExpertSource]:
    """One entry, checked against its own manifest.

    Raises:
        BankError: the manifest lacks a key, or names something else than what is there.
        StorageError: a file is missing, malformed or damaged.
    """
    folder = Path(path)
    manifest = manifest_of(folder)
    weights = open_tensors(folder, TENSORS, {"files": manifest.files}).load()
    if PROMPT not in weights:
        raise BankError(f"{folder / TENSORS}: has no tensor `{PROMPT}`; write the entry again")
    prompt_PD = weights.pop(PROMPT)
    source = ExpertSource(
        name=manifest.task,
        kind=manifest.kind,
        rank=manifest.rank,
        alpha=manifest.alpha,
        weights=weights,
        prompt_PD=prompt_PD,
        base_sha256=manifest.base_sha256,
    )
    return manifest, source


def read_bank(
    bank_dir: str | Path,
    *,
    base_shape: Mapping[str, Any],
    base_name: str,
    tasks: Sequence[str] | None = None,
) -> list[ExpertSource]:
    """The entries to mix, each fit for this base model.

    Args:
        bank_dir: the bank.
        base_shape: of the base model that the experts go into.
        base_name: its hub id or folder. Where an entry knows nothing of its base's weights, the
            last parts of the names must agree; else the weights decide, in `PemtT5.target`.
        tasks: which entries, in this order; default: all, by name.

    Raises:
        BankError: no such bank or entry, or one made for another base model.
        StorageError: a file is missing, malformed or damaged.
    """
    sources = []
    for task in chosen_entries(bank_dir, tasks):
        folder = entry_folder(bank_dir, task)
        manifest, source = read_entry(folder)
        _check_base(folder, manifest, base_name, base_shape)
        try:
            source.check(base_shape)
        except ModelError as error:
            raise BankError(f"{folder / TENSORS}: {error}") from None
        sources.append(source)
    return sources


def import_official(
    folder: str | Path,
    *,
    bank_dir: str | Path,
    task: str,
    base: Mapping[str, Any],
    description: str | None = None,
    kind: str | None = None,
    alpha: float = 64.0,
    overwrite: bool = False,
) -> Path:
    """Put what the published code saved for one source task into a bank.

    Args:
        folder: holds `task_embedding.pt`, and `lora.pt` or `adapter.pt`.
        bank_dir, task: where it goes.
        base: `name` of the base model it was trained on, and its `base_shape`.
        description: see `Manifest`.
        kind: `lora` or `bottleneck`, where the folder holds both files.
        alpha: the LoRA expert's alpha, which the files do not tell; 64 as published.
        overwrite: replace an entry of that name.

    Returns:
        The entry's folder.

    Raises:
        BankError: a file is missing, would run code, or is not what the published code saves; the bank has such an
            entry; or as `write_entry`.
        ModelError, StorageError: as `write_entry`.
    """
    check_free(bank_dir, task, overwrite=overwrite)
    source = read_official(Path(folder), name=task, kind=kind, alpha=alpha)
    for site in sites_of(base):
        if site.is_ffn_output and not source.is_on(site.name):
            raise BankError(
                f"{folder}: the expert of {site.name}'s FFN is missing; needed is one per layer of this base model "
                f"({base['num_layers']} encoder, {base['num_decoder_layers']} decoder layers)"
            )
    return write_entry(bank_dir, source, base=base, description=description, metrics={})


def _check_base(
    folder: Path, manifest: Manifest, base_name: str, base_shape: Mapping[str, Any]
) -> None:
    for key, needed in base_shape.items():
        found = manifest.base.get(key)
        if found != needed:
            raise BankError(
                f"{folder / MANIFEST}: made for a base model with {key} {found}, "
                f"{base_name} has {needed}; train its experts on {base_name}"
            )
    found = str(manifest.base.get("name"))
    if manifest.base_sha256 is None and last_part(found) != last_part(base_name):
        raise BankError(
            f"{folder / MANIFEST}: made for the base model {found}, model_name_or_path is "
            f"{base_name}; train its experts on {base_name}"
        )


def _versions() -> dict[str, str]:
    return {
        "pemt": installed_version() or "not installed",  # run from a checkout
        **{package: version(package) for package in ("torch", "transformers")},
    }
