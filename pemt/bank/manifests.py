"""What a bank tells of its entries without their tensors: names, manifests, shapes.

Nothing here needs torch, so that a bank is listed, and a wrong name in `source_tasks` refused, at once.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pemt.config import PemtError
from pemt.storage import (
    MANIFEST,
    StorageError,
    check_file,
    read_manifest,
    recover_interrupted_replace,
)

TENSORS = "expert.safetensors"
PROMPT = "prompt"
FORMAT = 1
KINDS = ("lora", "bottleneck")
DTYPES = ("float32", "bfloat16", "float16")
_FILL = "fill it with `pemt source`, `pemt bank add` or `pemt bank pull`"
_TEXTS = ("description", "base_sha256", "origin", "licence")
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
        origin: the adapter on the hub that it was made of, `owner/name@commit`; None for one that was trained here, or
            came from a folder.
        licence: that adapter's, as its own card spells it; None where it is not known.
        files: what `storage` lists of the tensors' file: size, checksum, shapes.
    """

    format: int
    task: str
    description: str | None
    base: dict[str, Any]
    base_sha256: str | None
    kind: Literal["lora", "bottleneck"]
    rank: int
    alpha: float
    dtype: str
    metrics: dict[str, float]
    versions: dict[str, str]
    origin: str | None = None  # these two are lacking in older entries
    licence: str | None = None
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """Where the expert is, by the tensors that are listed."""
        listed = self.files.get(TENSORS)
        tensors = listed.get("tensors") if isinstance(listed, dict) else None
        return site_names(tensors) if isinstance(tensors, dict) else []


def entry_names(bank_dir: str | Path) -> list[str]:
    """The tasks that a bank has an entry for, sorted.

    Raises:
        BankError: there is no such bank, or it is empty.
    """
    bank = Path(bank_dir)
    if not bank.is_dir():
        raise BankError(f"bank_dir: {bank} is no folder; {_FILL}")
    recover_interrupted_replace(bank)
    if not (names := _names_in(bank)):
        raise BankError(f"bank_dir: {bank} has no entry; {_FILL}")
    return names


def _names_in(bank: Path) -> list[str]:
    names = (path.parent.name for path in bank.glob(f"*/{MANIFEST}"))
    return sorted(name for name in names if _is_name(name))


def manifests_in(bank_dir: str | Path) -> dict[str, Manifest]:
    """Each entry's manifest by its name; nothing where there is no bank, or an empty one.

    Raises:
        BankError, StorageError: as `manifest_of`.
    """
    bank = Path(bank_dir)
    if bank.is_dir():
        recover_interrupted_replace(bank)
    return {name: manifest_of(bank / name) for name in _names_in(bank)}


def site_names(tensors: Iterable[str]) -> list[str]:
    """The sites that an expert's tensors are on, each once: see `pemt.model.Site`."""
    return list(dict.fromkeys(name.partition(".down")[0] for name in tensors if ".down" in name))


def chosen_entries(bank_dir: str | Path, tasks: Sequence[str] | None) -> list[str]:
    """Which entries are mixed: `source_tasks` in its order, or all by name.

    A pattern (`glue-*`) stands for the entries that match it and are not named before it, by name.

    Raises:
        BankError: no such bank or entry, none is named, or one twice.
    """
    entries = entry_names(bank_dir)
    chosen: list[str] = []
    for task in entries if tasks is None else tasks:
        if task in entries:
            chosen.append(task)
            continue
        matched = fnmatch.filter(entries, task)
        if not matched:
            raise BankError(
                f"source_tasks: `{task}` is not in {bank_dir}; {_nearest(task, entries)}"
            )
        chosen += [entry for entry in matched if entry not in chosen]
    if not chosen or len(set(chosen)) < len(chosen):
        raise BankError(f"source_tasks: found {chosen}; name at least one entry, each once")
    return chosen


def read_shapes(folder: Path) -> tuple[Manifest, dict[str, list[int]]]:
    """An entry without its tensors: the manifest, and the shape of each tensor by name.

    The file's size and checksum are compared with the manifest's.

    Raises:
        BankError, StorageError: as `read_entry`.
    """
    manifest = manifest_of(folder)
    path = folder / TENSORS
    listed: Any = manifest.files.get(TENSORS)
    try:
        check_file(path, listed)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    shapes = {name: list(tensor["shape"]) for name, tensor in listed["tensors"].items()}
    if PROMPT not in shapes:
        raise BankError(f"{path}: has no tensor `{PROMPT}`; write the entry again")
    return manifest, shapes


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
    if {**one.base, "name": None} != {**other.base, "name": None}:
        return False
    if one.base_sha256 is not None and other.base_sha256 is not None:
        return one.base_sha256 == other.base_sha256
    return last_part(str(one.base.get("name"))) == last_part(str(other.base.get("name")))


def check_one_base(manifests: Sequence[Manifest], *, where: str) -> None:
    """Refuse entries of several base models in one bank.

    Raises:
        BankError: two entries' base models differ.
    """
    for one, other in combinations(manifests, 2):
        if not same_base(one, other):
            raise BankError(
                f"{where}: `{other.task}` is for {_base_of(other)}, `{one.task}` is for {_base_of(one)}; a bank is for "
                "one base model"
            )


def _base_of(manifest: Manifest) -> str:
    digest = manifest.base_sha256
    weights = "weights not known" if digest is None else f"weights {digest[:8]}"
    return f"{manifest.base.get('name')} (d_model {manifest.base.get('d_model')}, {weights})"


def last_part(name: str) -> str:
    """`flan-t5-base` of a hub id or of a local folder: a copy on disk is the same model."""
    return name.rstrip("/").rsplit("/", maxsplit=1)[-1]


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


def manifest_of(folder: Path) -> Manifest:
    """An entry's manifest, checked.

    Raises:
        BankError: it lacks a key, or a value is none that can be.
        StorageError: it is missing, malformed or damaged.
    """
    path = folder / MANIFEST
    raw = read_manifest(folder)
    known = {each.name: each.default for each in fields(Manifest)}
    for key, default in known.items():
        if default is MISSING and key not in raw:
            raise BankError(f"{path}: lacks `{key}`; it is no entry of an expert bank")
    manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
    rank, alpha = manifest.rank, manifest.alpha
    rules = {
        "format": (manifest.format == FORMAT, str(FORMAT)),
        "task": (manifest.task == folder.name, f"`{folder.name}`, the folder's name"),
        "base": (isinstance(manifest.base, dict), "an object"),
        "kind": (manifest.kind in KINDS, " or ".join(KINDS)),
        "rank": (type(rank) is int and rank > 0, "a whole number above 0"),
        "alpha": (type(alpha) in (int, float) and alpha > 0, "a number above 0"),
        "dtype": (manifest.dtype in DTYPES, " or ".join(DTYPES)),
        "metrics": (_are_numbers(manifest.metrics), "numbers by name"),
        "versions": (isinstance(manifest.versions, dict), "an object"),
        **{key: (isinstance(raw.get(key), str | None), "text, or null") for key in _TEXTS},
    }
    for key, (fine, allowed) in rules.items():
        if not fine:
            raise BankError(f"{path}: {key}: found {raw[key]!r}, allowed is {allowed}")
    return manifest


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(type(each) in (int, float) for each in values.values())


def _nearest(task: str, entries: Sequence[str]) -> str:
    near = difflib.get_close_matches(task, entries, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(entries)}"
