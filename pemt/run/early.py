"""What is wrong with a run as far as it shows without torch: reported within a second, not after ten of imports.

Whoever trains or evaluates looks again, on all ranks and with everything loaded.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pemt.bank import chosen_entries, entry_folder, manifest_of
from pemt.checkpoint import Finished, check_lock, resolve_run
from pemt.config import (
    PEFT_METHODS,
    AdaptConfig,
    ConfigError,
    RunConfig,
    SourceConfig,
    launched_deepspeed_json,
)
from pemt.data import DataError, task_files
from pemt.tasks import get_task


def check_early(config: RunConfig) -> None:
    """Refuse a run that cannot be trained; rank 0 alone looks, and writes nothing: the run asks `resolve_run` itself.

    Raises:
        PemtError: DeepSpeed's JSON, output_dir, task, data or base model's folder, or the bank.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    launched_deepspeed_json(config)
    if isinstance(config, SourceConfig):
        entry_folder(config.bank_dir, config.task_name)
    start = resolve_run(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if isinstance(start, Finished):
        return  # nothing is read any more
    check_lock(Path(config.output_dir))
    check_trackers(config)
    check_nothing_given(config)
    check_inputs(config)


def check_inputs(config: RunConfig) -> None:
    """Refuse what a run cannot read: its task, data, bank or base model, as far as it shows without torch.

    Raises:
        PemtError: as `check_early`.
    """
    task = get_task(config.task_name, config.task_file)
    if isinstance(config, AdaptConfig) and config.method not in PEFT_METHODS:
        check_method(config)
    task_files(task, config.data_dir)
    check_base_place(config)


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        ConfigError: with the package to install.
    """
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to: found `{name}`, which is not installed here; `pip install {name}`, or leave it out"
            )


def check_nothing_given(config: RunConfig) -> None:
    """Refuse to train a run whose data or task were given in Python without them.

    Raises:
        DataError: it is one.
    """
    if config.data_fingerprint is not None:
        raise DataError(
            "data_fingerprint: data or task of this run were given in Python: `run_adapt(config, train=..., "
            "task=...)`. Give them there again; or take that line out, and give --data_dir and a new output_dir"
        )


def check_base_place(config: RunConfig) -> None:
    """Refuse a base model or tokenizer that is nowhere: neither a folder, nor on a hub within reach.

    Raises:
        ConfigError: what is written like a path is no folder, or has no config.json; or it can be had neither
            from the hub nor from its cache.
    """
    _check_folder(config.model_name_or_path)
    for field, place, file in (
        ("model_name_or_path", config.model_name_or_path, "config.json"),
        ("tokenizer_name", config.tokenizer_name, "tokenizer_config.json"),
    ):
        if place is None or Path(place).exists():
            continue
        from pemt.storage import HubError, check_hub  # only a hub id needs huggingface_hub

        try:
            check_hub(place, file=file)
        except HubError as error:
            raise ConfigError(f"{field}: {error}") from None


def _check_folder(name: str) -> None:
    folder = Path(name)
    wanted = "give a hub id, or a folder with config.json and weights"
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"model_name_or_path: {name} has no config.json; {wanted}")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not folder.is_dir():
        raise ConfigError(f"model_name_or_path: there is no folder {name}; {wanted}")


def check_method(config: AdaptConfig) -> None:
    """Find out, before anything is loaded, whether a method lacks its library or its bank.

    Raises:
        PeftError: peft is not installed, or `peft_config` is wrong.
        ConfigError: the method does not go with gradient_checkpointing.
        BankError, StorageError: there is no such bank or entry, or its manifest is damaged.
    """
    if config.method in PEFT_METHODS:
        from pemt.model import PREFIXES, peft_settings  # peft tells, and takes torch with it

        kind = peft_settings(config.method, config.peft_config).peft_type.value
        if config.gradient_checkpointing and kind in PREFIXES:
            # transformers would drop the prefix from every block that is recomputed
            raise ConfigError(
                f"gradient_checkpointing: does not go with {kind}; leave one of them out"
            )
    elif config.method == "pemt":
        assert config.bank_dir is not None
        for name in chosen_entries(config.bank_dir, config.source_tasks):
            manifest_of(entry_folder(config.bank_dir, name))
