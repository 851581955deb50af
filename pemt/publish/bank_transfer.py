"""`pemt bank push` and `pull`: a whole bank to the hub and from it. One repository, one folder an expert."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pemt.bank import (
    ENTRY_FILES,
    BankError,
    Changes,
    check_entries,
    check_one_base,
    compare,
    manifests_in,
    move_entries,
)
from pemt.config import PemtError
from pemt.publish.bank_card import bank_card
from pemt.publish.card import base_licence
from pemt.storage import MANIFEST, HubError, commit_files, commit_of, fetch_files, make_repository

README = "README.md"
MANIFESTS = f"*/{MANIFEST}"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What became of a push.

    Args:
        address: the commit's; None where all was there already.
        changes: what it did to the repository's entries.
        base_model: what the card names as the base model.
    """

    address: str | None
    changes: Changes
    base_model: str


def push_bank(
    bank_dir: str | Path,
    repo_id: str,
    *,
    private: bool,
    message: str,
    overwrite: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
) -> Pushed:
    """Push every entry of a bank as one commit, with a card of all that the repository has then.

    Args:
        bank_dir: the bank.
        repo_id: `owner/name`; made if it does not exist.
        private: if it is made now.
        message: of the commit.
        overwrite: replace entries that are there under the same names and differ.
        base_model: what the card names as the base model; default: as the entries do.
        licence: of entries that were made of no adapter of the hub; default: what the base model's own card says.

    Raises:
        BankError: there is no bank, an entry is damaged or would replace another one, or they are for several bases.
        HubError: the hub is out of reach, refuses name or token, or the repository was changed meanwhile.
    """
    check_entries(bank_dir, None, where=str(bank_dir))
    ours = manifests_in(bank_dir)
    check_one_base(list(ours.values()), where=str(bank_dir))
    name = base_model or str(next(iter(ours.values())).base.get("name"))
    commit = make_repository(repo_id, private=private)
    with tempfile.TemporaryDirectory() as folder:
        fetch_files(repo_id, Path(folder), files=[MANIFESTS, README], commit=commit)
        theirs = manifests_in(folder)
        readme = Path(folder, README)
        old_card = readme.read_text(encoding="utf-8") if readme.is_file() else None
    changes = compare(ours, theirs, where=repo_id, overwrite=overwrite)
    together = dict(sorted({**theirs, **{name: ours[name] for name in changes.moved}}.items()))
    card = bank_card(together, repo_id, base_model=name, licence=licence or base_licence(name))
    files: dict[str, Path | bytes] = {
        f"{entry}/{file}": Path(bank_dir, entry, file)
        for entry in changes.moved
        for file in ENTRY_FILES
    }
    address = None
    if files or card != old_card:
        files[README] = card.encode("utf-8")
        address = commit_files(repo_id, files, message=message, parent=commit)
    return Pushed(address=address, changes=changes, base_model=name)


def pull_bank(
    repo_id: str, bank_dir: str | Path, *, revision: str | None = None, overwrite: bool = False
) -> Changes:
    """Fetch every expert of a bank on the hub into a bank here; entries that are here already are not fetched.

    Nothing is added before all of it is here and found intact. A cut connection leaves what has come under a hidden
    name in the bank; the same call goes on with it.

    Args:
        repo_id: `owner/name`.
        bank_dir: made if it does not exist.
        revision: branch, tag or commit.
        overwrite: replace entries of the same name that differ.

    Raises:
        BankError: the repository holds no bank, an entry is damaged, another one of its name is here, or they are for
            several base models.
        HubError: there is no such repository, or the hub is out of reach.
        StorageError: the disk refused.
    """
    bank = Path(bank_dir)
    commit = commit_of(repo_id, revision=revision)
    with _fetching(bank, repo_id, commit) as folder:
        fetch_files(repo_id, folder, files=[MANIFESTS], commit=commit)
        coming = manifests_in(folder)
        if not coming:
            raise BankError(
                f"{repo_id}: holds no expert bank (no folder with a {MANIFEST}); an adapter in PEFT's format is added "
                "by `pemt bank add --peft`, an adapted model fetched by `pemt pull`"
            )
        changes = compare(coming, manifests_in(bank), where=str(bank), overwrite=overwrite)
        wanted = [f"{name}/{file}" for name in changes.moved for file in ENTRY_FILES]
        if wanted:
            fetch_files(repo_id, folder, files=wanted, commit=commit)
            check_entries(folder, changes.moved, where=repo_id)
            move_entries(folder, bank, changes.moved)
    return changes


@contextmanager
def _fetching(bank: Path, repo_id: str, commit: str) -> Iterator[Path]:
    """A hidden folder in the bank, on whose disk it is; it stays where the hub failed, to be gone on with."""
    hidden = f".fetching-{repo_id.replace('/', '-')}-"
    folder = bank / f"{hidden}{commit}"
    for other in bank.glob(f"{hidden}*"):  # cut short, and there is a newer commit
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
    except HubError:
        raise
    except PemtError:
        _remove(folder)
        raise
    _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # a bank that was made for it and got nothing
        folder.parent.rmdir()
