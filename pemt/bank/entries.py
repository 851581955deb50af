"""The expert bank: what stage 1 leaves and stage 2 reads.

`bank_dir/<task>/` holds `expert.safetensors` (the expert's tensors, and the prompt) and
`manifest.json`: which task and base model it belongs to, how it was made, and checksums.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pemt.bank.official import read_official
from pemt.config import PemtError
from pemt.model import ExpertSource, ModelError
from pemt.storage import (
    MANIFEST,
    read_manifest,
    read_tensors,
    recover_interrupted_replace,
    write_folder,
)

TENSORS = "expert.safetensors"
PROMPT = "prompt"
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("lora", "bottleneck")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class BankError(PemtError):
    """A bank, or an entry of it, that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of an entry without its tensors.

    Args:
        format: version of this layout.
        task: the source task, also the folder's name.
        description: the sentence that the prompt started from; None where it is not known.
        base: `name` of the base model, and its `base_shape`.
        base_sha256: of its weights, as in `ExpertSource`; None for an imported entry.
        kind, rank, alpha: the expert, as in `ExpertSource`.
        dtype: the tensors' dtype.
        metrics: the source task's test metrics, in percent.
        versions: of the software that wrote it.
    """

    format: int
    task: str
    description: str | None
    base: dict[str, Any]
    base_sha256: str | None
    kind: str
    rank: int
    alpha: float
    dtype: str
    metrics: dict[str, float]
    versions: dict[str, str]


def write_entry(
    bank_dir: str | Path,
    source: ExpertSource,
    *,
    base: Mapping[str, Any],
    description: str | None,
    metrics: Mapping[str, float],
    dtype: str = "float32",
) -> Path:
    """Write one entry, whole or not at all; an older one of the same task is replaced.

    Args:
        bank_dir: the bank, made if it does not exist.
        source: expert and prompt.
        base: `name` of the base model, and its `base_shape`.
        description, metrics: see `Manifest`.
        dtype: what to store the tensors in.

    Returns:
        The entry's folder.

    Raises:
        BankError: the task's name cannot be a folder's, or a tensor is not finite in that dtype.
        ModelError: the expert does not fit that base model.
        StorageError: it cannot be written.
    """
    folder = entry_folder(bank_dir, source.name)
    source.check(base)
    tensors = {**source.weights, PROMPT: source.prompt_PD}
    tensors = {key: tensor.detach().cpu().to(DTYPES[dtype]) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BankError(
                f"{folder}: not written: tensor `{key}` has infinite or NaN values in {dtype}; "
                "the training diverged, lower learning_rate"
            )
    manifest = Manifest(
        format=FORMAT,
        task=source.name,
        description=description,
        base=dict(base),
        base_sha256=source.base_sha256,
        kind=source.kind,
        rank=source.rank,
        alpha=source.alpha,
        dtype=dtype,
        metrics=dict(metrics),
        versions=_versions(),
    )
    return write_folder(folder, {TENSORS: tensors}, asdict(manifest))


def read_entry(path: str | Path) -> tuple[Manifest, ExpertSource]:
    """One entry, checked against its own manifest.

    Raises:
        BankError: the manifest lacks a key, or names something else than what is there.
        StorageError: a file is missing, malformed or damaged.
    """
    folder = Path(path)
    manifest, raw = _manifest(folder)
    weights = read_tensors(folder, TENSORS, raw)
    if PROMPT not in weights:
        raise BankError(
            f"{folder / TENSORS}: has no tensor `{PROMPT}`; the entry must be made anew"
        )
    prompt_PD = weights.pop(PROMPT)
    source = ExpertSource(
        name=manifest.task,
        kind="lora" if manifest.kind == "lora" else "bottleneck",
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
    entries = entry_names(bank_dir)
    for task in tasks if tasks is not None else ():
        if task not in entries:
            raise BankError(
                f"source_tasks: `{task}` is not in {bank_dir}; {_nearest(task, entries)}"
            )
    chosen = entries if tasks is None else list(tasks)
    if not chosen or len(set(chosen)) < len(chosen):
        raise BankError(f"source_tasks: found {chosen}; name at least one entry, each once")
    sources = []
    for task in chosen:
        folder = entry_folder(bank_dir, task)
        manifest, source = read_entry(folder)
        _check_base(folder, manifest, base_name, base_shape)
        try:
            source.check(base_shape)
        except ModelError as error:
            raise BankError(f"{folder / TENSORS}: {error}") from None
        sources.append(source)
    return sources


def entry_names(bank_dir: str | Path) -> list[str]:
    """The tasks that a bank has an entry for, sorted.

    Raises:
        BankError: there is no such bank, or it is empty.
    """
    bank = Path(bank_dir)
    if not bank.is_dir():
        raise BankError(f"bank_dir: {bank} is no folder; fill it with `pemt source`")
    recover_interrupted_replace(bank)
    names = sorted(
        path.parent.name for path in bank.glob(f"*/{MANIFEST}") if _is_name(path.parent.name)
    )
    if not names:
        raise BankError(f"bank_dir: {bank} has no entry; fill it with `pemt source`")
    return names


def read_manifests(bank_dir: str | Path) -> list[Manifest]:
    """All entries' manifests, sorted by task: what a listing of the bank shows.

    Raises:
        BankError: no such bank, or a manifest that lacks a key.
        StorageError: a manifest is malformed.
    """
    return [_manifest(entry_folder(bank_dir, name))[0] for name in entry_names(bank_dir)]


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
        OfficialError: a file is missing, would run code, or is not what the published code saves.
        BankError: the bank has such an entry, or as `write_entry`.
        ModelError, StorageError: as `write_entry`.
    """
    check_free(bank_dir, task, overwrite=overwrite)
    source = read_official(Path(folder), name=task, kind=kind, alpha=alpha)
    return write_entry(bank_dir, source, base=base, description=description, metrics={})


def check_free(bank_dir: str | Path, task: str, *, overwrite: bool) -> None:
    """Keep what comes from elsewhere from taking a trained entry's place unasked.

    Raises:
        BankError: there is such an entry and `overwrite` is false, or the name is no folder's.
    """
    folder = entry_folder(bank_dir, task)
    if not overwrite and (folder / MANIFEST).exists():
        raise BankError(
            f"{folder}: there is an entry of that name; give another with --task, or replace it with --overwrite"
        )


def same_base(one: Manifest, other: Manifest) -> bool:
    """Whether two entries belong to one base model: by its weights where both know them, else by its name."""
    shapes = [{**each.base, "name": None} for each in (one, other)]
    if one.base_sha256 is not None and other.base_sha256 is not None:
        return shapes[0] == shapes[1] and one.base_sha256 == other.base_sha256
    names = [_last_part(str(each.base.get("name"))) for each in (one, other)]
    return shapes[0] == shapes[1] and names[0] == names[1]


def entry_folder(bank_dir: str | Path, task: str) -> Path:
    """Where a task's entry lies.

    Raises:
        BankError: the name is no plain folder name, so it could lie outside of the bank.
    """
    if not _is_name(task):
        raise BankError(
            f"source task `{task}`: no name for a folder of the bank; allowed are letters, digits "
            "and . _ + - after a first letter or digit"
        )
    return Path(bank_dir) / task


def _is_name(task: str) -> bool:
    return _NAME.fullmatch(task) is not None


def _manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """An entry's manifest, checked, and the JSON object it was read from."""
    path = folder / MANIFEST
    raw = read_manifest(folder)
    names = [field.name for field in fields(Manifest)]
    missing = [name for name in names if name not in raw]
    if missing:
        raise BankError(f"{path}: lacks `{missing[0]}`; it is no entry of an expert bank")
    manifest = Manifest(**{name: raw[name] for name in names})
    rank, alpha = manifest.rank, manifest.alpha
    rules = {
        "format": (manifest.format == FORMAT, str(FORMAT)),
        "task": (manifest.task == folder.name, f"`{folder.name}`, the folder's name"),
        "base": (isinstance(manifest.base, dict), "an object"),
        "kind": (manifest.kind in KINDS, " or ".join(KINDS)),
        "rank": (type(rank) is int and rank > 0, "a whole number above 0"),
        "alpha": (type(alpha) in (int, float) and alpha > 0, "a number above 0"),
    }
    for key, (fine, allowed) in rules.items():
        if not fine:
            raise BankError(f"{path}: {key}: found {raw[key]!r}, allowed is {allowed}")
    return manifest, raw


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
    if manifest.base_sha256 is None and _last_part(found) != _last_part(base_name):
        raise BankError(
            f"{folder / MANIFEST}: made for the base model {found}, model_name_or_path is "
            f"{base_name}; train its experts on {base_name}"
        )


def _last_part(name: str) -> str:
    """`flan-t5-base` of a hub id or of a local folder: a copy on disk is the same model."""
    return name.rstrip("/").rsplit("/", maxsplit=1)[-1]


def _nearest(task: str, entries: Sequence[str]) -> str:
    near = difflib.get_close_matches(task, entries, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(entries)}"


def _versions() -> dict[str, str]:
    return {package: _version(package) for package in ("pemt", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # pemt itself, run from a checkout
