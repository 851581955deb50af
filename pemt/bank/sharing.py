"""Entries of one bank in another, as they stand: which are new there, which are the same, which are in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pemt.bank.manifests import TENSORS, BankError, Manifest, check_one_base, manifests_in
from pemt.bank.tools import verify
from pemt.storage import MANIFEST, copy_files, move_files, write_folders

ENTRY_FILES = (TENSORS, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What becomes of entries that go where others are.

    Args:
        new: there was none of that name.
        replaced: there was another one of that name.
        same: there already.
    """

    new: list[str]
    replaced: list[str]
    same: list[str]

    @property
    def moved(self) -> list[str]:
        """Those that go over."""
        return sorted([*self.new, *self.replaced])

    def summary(self) -> str:
        """In a line: `added mnli, qnli; replaced rte; there already: cola`."""
        parts = {"added ": self.new, "replaced ": self.replaced, "there already: ": self.same}
        return "; ".join(f"{what}{', '.join(names)}" for what, names in parts.items() if names)


def compare(
    coming: Mapping[str, Manifest], there: Mapping[str, Manifest], *, where: str, overwrite: bool
) -> Changes:
    """What becomes of entries in a bank that has some.

    Two are the same whose manifests, with the checksums of the tensors, are; the versions of the software that wrote
    them are not looked at.

    Args:
        coming, there: as `manifests_in` gives them.
        where: the bank that has some, for messages.
        overwrite: replace entries of the same name that differ.

    Raises:
        BankError: such an entry is there and `overwrite` is false, or they are for several base models.
    """
    same = [
        name
        for name, each in coming.items()
        if name in there and replace(there[name], versions=each.versions) == each
    ]
    others = [name for name in coming if name in there and name not in same]
    if others and not overwrite:
        raise BankError(
            f"{where}: has {_count(len(others), 'other entry', 'other entries')} of the same name: "
            f"{', '.join(others)}; nothing was changed: replace with --overwrite, or keep them apart in another bank"
        )
    check_one_base(list({**there, **coming}.values()), where=where)
    return Changes(new=[name for name in coming if name not in there], replaced=others, same=same)


def check_entries(bank_dir: str | Path, tasks: Sequence[str] | None, *, where: str) -> None:
    """Refuse a bank of which an entry is damaged.

    Raises:
        BankError: one is, and how.
    """
    faults = {task: fault for task, fault in verify(bank_dir, tasks).items() if fault}
    if faults:
        first = next(iter(faults.values()))
        raise BankError(
            f"{where}: {_count(len(faults), 'entry', 'entries')} cannot be used ({', '.join(faults)}); nothing was "
            f"changed. The first: {first}"
        )


def move_entries(source: Path, bank_dir: Path, names: Sequence[str]) -> None:
    """Move entries from a folder of the same disk into a bank: none is seen before all are ready.

    Raises:
        StorageError: the disk refused.
    """
    write_folders({bank_dir / name: move_files(source / name, ENTRY_FILES) for name in names})


def merge(bank_dir: str | Path, others: Sequence[str | Path]) -> list[str]:
    """Copy every entry of other banks into one, which is made if it does not exist.

    Nothing is written unless every entry is intact, no name occurs twice, and all are for one base model.

    Returns:
        The names of the entries that were added.

    Raises:
        BankError: an entry is damaged, a name occurs twice, or base models differ.
    """
    merged = manifests_in(bank_dir)
    if merged:
        check_entries(bank_dir, None, where=str(bank_dir))
    writers = {}
    for other in others:
        check_entries(other, None, where=str(other))
        for name, manifest in manifests_in(other).items():
            if name in merged:
                raise BankError(
                    f"{other}: has an entry `{name}`, and so has {bank_dir} or another of these banks; "
                    "remove one of the two with `pemt bank remove`"
                )
            merged[name] = manifest
            check_one_base(list(merged.values()), where=str(other))
            writers[Path(bank_dir, name)] = copy_files(Path(other, name), ENTRY_FILES)
    write_folders(writers)
    return [folder.name for folder in writers]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
