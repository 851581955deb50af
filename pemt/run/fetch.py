"""`pemt fetch`: everything that a run reads, brought here while there is a network; and where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
from huggingface_hub import constants, try_to_load_from_cache

from pemt.bank import chosen_entries, entry_folder, read_bank
from pemt.config import AdaptConfig, ConfigError, RunConfig
from pemt.data import TaskData, load_task_data, task_files
from pemt.model import base_shape, fetch_base, load_pretrained
from pemt.tasks import Task, get_task

FETCHED = "pemt-fetched.txt"  # in an offline folder, so that a copy of it can be distinguished from an older one
OFFLINE = "HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1"


def fetch_all(config: RunConfig) -> Iterator[str]:
    """Bring and check base, tokenizer, data and experts, as the run itself would; a line each, as soon as it is here.

    Nothing is trained. Examples are made and tokenised too, in the cache of `datasets`, where the run finds them.

    Args:
        config: the run's.

    Raises:
        PemtError: anything that would end the run before its first step.
    """
    task = get_task(config.task_name, config.task_file)
    files, _ = task_files(task, config.data_dir)
    if config.streaming and not files:
        raise ConfigError(
            f"streaming: the run reads {task.name} from the hub while it trains, which a node without a network "
            "cannot; leave streaming out, or give --data_dir"
        )
    fetch_base(config)
    name = config.model_name_or_path
    base, tokenizer = load_pretrained(name, config.tokenizer_name, lazy=True)
    yield _line("base", name, place_of(name))
    yield _line("tokenizer", config.tokenizer_name or name, place_of(config.tokenizer_name or name))
    yield _data(task, config, load_task_data(task, config, tokenizer), local=bool(files))
    if isinstance(config, AdaptConfig) and config.method == "pemt":
        assert config.bank_dir is not None
        shape = base_shape(base.config)
        read_bank(config.bank_dir, base_shape=shape, base_name=name, tasks=config.source_tasks)
        names = chosen_entries(config.bank_dir, config.source_tasks)
        folder = entry_folder(config.bank_dir, names[0]).resolve().parent
        yield _line("experts", ", ".join(names), f"{folder}, where a run reads them")
    yield f"offline: export HF_HOME={os.environ.get('HF_HOME') or constants.HF_HOME} {OFFLINE}"


def place_of(name: str) -> str:
    """Where a model's or tokenizer's files lie."""
    if Path(name).is_dir():
        return f"{Path(name).resolve()}, a folder: it is read there and not copied"
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str):
            return str(Path(found).parent)
    return constants.HF_HUB_CACHE


def _data(task: Task, config: RunConfig, data: TaskData, *, local: bool) -> str:
    sizes = ", ".join(
        f"{'a stream' if part == 'train' and config.streaming else len(getattr(data, part))} {part}"
        for part in ("train", "validation", "test")
    )
    cache = str(datasets.config.HF_DATASETS_CACHE)
    place = f"{cache}, made from {config.data_dir or 'local files'}" if local else cache
    return _line("data", f"{task.name} ({sizes})", place)


def _line(what: str, name: str, place: str) -> str:
    return f"{what + ':':<11}{name}: {place}"
