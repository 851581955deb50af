"""`pemt export`: a finished run as a folder for others."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pemt.bank import read_bank
from pemt.checkpoint import RESULTS
from pemt.config import AdaptConfig, PemtError, read_json_object
from pemt.model import FullT5, PeftT5, bars_on_terminals_alone, base_digest, base_shape
from pemt.monitor import save_gate_map
from pemt.publish.adapter_format import (
    CONFIG,
    FORMAT,
    METHODS,
    Dtype,
    Settings,
    source_settings,
    write_adapter,
)
from pemt.publish.card import GATES, Card, base_licence, model_card
from pemt.run import LoadedRun, load_finished
from pemt.tasks import longest_target

README = "README.md"


def export_run(
    run_dir: str | Path,
    folder: str | Path,
    *,
    base_model: str | None = None,
    dtype: Dtype = "float32",
    licence: str | None = None,
) -> Path:
    """Write a finished run's best weights, and all that they need beside the base model.

    `pemt`, `adapter` and `bitfit` give an adapter of our own (`PemtModel.from_pretrained`), methods of the
    peft library one of PEFT's (`peft.PeftModel.from_pretrained`), `full` a full model.

    Args:
        run_dir: the run's output folder.
        folder: receives the files; new or empty; written atomically.
        base_model: what the adapter names as its base model; default: as the run was given it.
        dtype: of our own adapters' tensors: `float32` gives the run's own outputs, `bfloat16` and
            `float16` half the size.
        licence: the base model's; default: what its own model card says.

    Raises:
        PemtError: a source run, a folder in use, or it cannot be written; or as `load_finished`.
    """
    run_dir, target = Path(run_dir).expanduser(), Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PemtError(f"{target}: is not empty; give a new folder")
    finished = load_finished(run_dir)
    config = finished.config
    if not isinstance(config, AdaptConfig):
        raise PemtError(
            f"{run_dir}: is a source run, whose result is the bank's entry `{config.task_name}`; "
            "`pemt bank export BANK --peft FOLDER` writes that for others"
        )
    name = base_model or config.model_name_or_path
    with _new_folder(target) as temporary:
        _write_model(temporary, finished, config, name, dtype)
        card = Card(
            base_model=name,
            model_type=finished.model.base.config.model_type,
            licence=licence or base_licence(config.model_name_or_path),
            results=_results(run_dir / RESULTS),
            config=config,
            task=finished.task,
            dtype=dtype if config.method in METHODS else "float32",
            bytes=sum(path.stat().st_size for path in temporary.iterdir()),
        )
        _write_card(temporary, card)
    return target


def _write_card(folder: Path, card: Card) -> None:
    if card.gates:
        save_gate_map(card.gates, folder / GATES, title="Mean gate on the test set")
    (folder / README).write_text(model_card(card), encoding="utf-8")


def _write_model(
    folder: Path, finished: LoadedRun, config: AdaptConfig, base_model: str, dtype: Dtype
) -> None:
    # as it was scored, for whoever asks it by transformers alone
    answers = finished.model.base.generation_config
    answers.num_beams = config.num_beams
    answers.max_new_tokens = longest_target(finished.task, config.max_target_length)
    if isinstance(finished.model, PeftT5):
        _write_peft(folder, finished.model, base_model)
        answers.save_pretrained(folder)
    elif isinstance(finished.model, FullT5):
        with bars_on_terminals_alone():
            finished.model.base.save_pretrained(folder)
        finished.tokenizer.save_pretrained(folder)
    else:
        _write_own(folder, finished, config, base_model, dtype)


def _write_own(
    folder: Path, finished: LoadedRun, config: AdaptConfig, base_model: str, dtype: Dtype
) -> None:
    base, task = finished.model.base, finished.task
    experts = []
    if finished.source_names:
        assert config.bank_dir is not None
        experts = read_bank(
            config.bank_dir,
            base_name=config.model_name_or_path,
            base_shape=base_shape(base.config),
            tasks=finished.source_names,
        )
    settings = Settings(
        format=FORMAT,
        method=config.method,
        base_model_name_or_path=base_model,
        base_sha256=base_digest(base),
        tokenizer_name=config.tokenizer_name,
        task_name=task.name,
        template=task.template,
        labels=list(task.labels),
        label_names=list(task.label_names),
        max_source_length=config.max_source_length,
        max_new_tokens=longest_target(task, config.max_target_length),
        num_beams=config.num_beams,
        reduction_factor=config.adapter.reduction_factor,
        train_layer_norms=config.mixture.train_layer_norms,
        mixture=config.mixture,
        sources=source_settings(experts),
        dtype=dtype,
    )
    trained = dict(finished.model.trainable_parameters())
    write_adapter(folder, settings, trained=trained, experts=experts)


def _write_peft(folder: Path, model: PeftT5, base_model: str) -> None:
    model.peft.save_pretrained(folder)
    path = folder / CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = base_model
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _results(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when that has gone well, and else goes."""
    temporary = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.glob("*.safetensors"):  # written for their owner only
            shutil.copymode(temporary / README, path)
        temporary.replace(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PemtError(f"{folder}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
