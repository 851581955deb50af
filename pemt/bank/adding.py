"""LoRA adapters in PEFT's format become entries of a bank: all of them, or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pemt.bank.entries import write_entry
from pemt.bank.manifests import BankError, check_free, entry_folder, manifest_of
from pemt.bank.peft_files import FILES
from pemt.bank.peft_format import PeftLora, read_base_name, read_peft
from pemt.model import (
    ExpertSource,
    base_digest,
    base_shape,
    checked_base,
    description_prompt,
    load_pretrained,
)
from pemt.storage import MANIFEST, licence_in, local_folder, write_folders
from pemt.tasks import get_task, task_names

DOWNLOADS = 8  # at a time


@dataclass(frozen=True)
class Adapter:
    """One adapter that is to be an entry.

    Args:
        path_or_id: its folder, or a hub id.
        task: the entry's name; default: the last part of the folder's name or hub id.
        description: one sentence; its tokens' embeddings become the prompt, where the adapter has none. Default: the
            description of the task of that name; where the entry is named after the adapter, the words of that name.
    """

    path_or_id: str
    task: str | None = None
    description: str | None = None

    @property
    def entry(self) -> str:
        """The entry's name."""
        return self.task or re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(self.path_or_id).name)

    def origin(self, folder: Path) -> str | None:
        """`owner/name@commit` of an adapter from the hub, of which `folder` is the snapshot."""
        if Path(self.path_or_id).expanduser().is_dir():
            return None
        return f"{self.path_or_id}@{folder.name}"

    def sentence(self) -> str | None:
        """What the prompt is made of, where the adapter has none of its own."""
        if self.description is not None:
            return self.description
        if self.entry in task_names():
            return get_task(self.entry).description
        return None if self.task else re.sub(r"[-_.+]+", " ", self.entry)


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of an adapter.

    Args:
        folder: the new entry.
        base_name: the base model it belongs to.
        lora: the expert: its rank, where it is, and where it is not.
        prompt: the description that its prompt was made from; None where the adapter has one of its own.
    """

    folder: Path
    base_name: str
    lora: PeftLora
    prompt: str | None


def add_peft(
    adapters: Sequence[Adapter],
    *,
    bank_dir: str | Path,
    model_name_or_path: str | None = None,
    tokenizer_name: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> list[Added]:
    """Put LoRA adapters in PEFT's format, on any linear layers of one T5, into a bank.

    They are fetched side by side; nothing is written before all of them have been read.

    Args:
        adapters: which, and their names in the bank.
        bank_dir: where they go.
        model_name_or_path: their base model; default: the one that their configurations name.
        tokenizer_name: where the tokenizer lies elsewhere.
        revision: of the hub repositories.
        overwrite: replace entries of these names.

    Raises:
        BankError: the bank has such an entry, two have one name, or one has neither prompt nor description, is no plain
            LoRA on linear layers, or fits another base model.
        PemtError: the base model or the hub cannot be read, or the bank cannot be written.
    """
    _check_names(adapters, bank_dir, overwrite=overwrite)
    folders = _fetched(adapters, revision)
    base_name = model_name_or_path or _common_base(folders)
    base, tokenizer = load_pretrained(base_name, tokenizer_name or base_name, lazy=True)
    shape = base_shape(base.config)
    writers: dict[Path, Callable[[Path], None]] = {}
    added = []
    for adapter, path in zip(adapters, folders, strict=True):
        lora, sentence = read_peft(path, shape), adapter.sentence()
        folder = write_entry(
            bank_dir,
            _expert(adapter, lora, base, tokenizer),
            base={"name": base_name, **shape},
            description=sentence,
            metrics={},
            origin=adapter.origin(path),
            licence=licence_in(path),
            write=writers.update,
        )
        prompt = sentence if lora.prompt_PD is None else None
        added.append(Added(folder=folder, base_name=base_name, lora=lora, prompt=prompt))
    write_folders(writers)
    return added


def is_made_of(bank_dir: str | Path, adapter: Adapter) -> bool:
    """Whether a bank's entry of this name was made of this adapter of the hub, at whatever commit.

    Raises:
        BankError, StorageError: the entry is damaged.
    """
    folder = entry_folder(bank_dir, adapter.entry)
    if not (folder / MANIFEST).exists():
        return False
    origin = manifest_of(folder).origin
    return origin is not None and origin.rpartition("@")[0] == adapter.path_or_id


def _fetched(adapters: Sequence[Adapter], revision: str | None) -> list[Path]:
    fetch = partial(local_folder, files=FILES, revision=revision)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        return list(pool.map(fetch, (adapter.path_or_id for adapter in adapters)))


def _check_names(adapters: Sequence[Adapter], bank_dir: str | Path, *, overwrite: bool) -> None:
    names = [adapter.entry for adapter in adapters]
    for name in names:
        check_free(bank_dir, name, overwrite=overwrite)
        if names.count(name) > 1:
            raise BankError(
                f"--task: `{name}` is the name of two entries; give each a name of its own"
            )


def _expert(
    adapter: Adapter, lora: PeftLora, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ExpertSource:
    prompt_PD = lora.prompt_PD
    if prompt_PD is None:
        sentence = adapter.sentence()
        if sentence is None:
            raise BankError(
                f"description: missing; {adapter.path_or_id} has no task prompt and `{adapter.entry}` is no task that "
                "`pemt tasks` lists: say in one sentence what it does, --description '...'"
            )
        prompt_PD = description_prompt(tokenizer, base, sentence)
    return ExpertSource(
        name=adapter.entry,
        kind="lora",
        rank=lora.rank,
        alpha=lora.alpha,
        weights=lora.weights,
        prompt_PD=prompt_PD,
        base_sha256=base_digest(checked_base(base)),
    )


def _common_base(folders: Sequence[Path]) -> str:
    names = {folder: read_base_name(folder) for folder in folders}
    for folder, name in names.items():
        if not name:
            raise BankError(
                f"{folder}: does not name its base model; give it with --model_name_or_path"
            )
    (first, base_name), *others = names.items()
    for folder, name in others:
        if name != base_name:
            raise BankError(
                f"{folder}: is for the base model {name}, and {first} is for {base_name}; a bank is for one: add them "
                "to two banks, or give --model_name_or_path where both names mean one model"
            )
    assert base_name is not None
    return base_name
