"""A finished run, taken up again from its folder: configuration, task, tokenizer, model with the best weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pemt.checkpoint import (
    CONFIG,
    WEIGHTS,
    Progress,
    checkpoint_folders,
    load_trained,
    progress_of,
)
from pemt.config import AdaptConfig, PemtError, RunConfig, SourceConfig, parse_config
from pemt.engine import Engine
from pemt.model import TrainedT5, base_digest, checked_base, load_base, read_lazy
from pemt.run.build import build_model
from pemt.storage import read_manifest, read_tensors
from pemt.tasks import Task, get_task


class FinishedError(PemtError):
    """A folder that holds no run to take up again."""


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run with its best weights.

    Args:
        folder: the run's output folder.
        config: its configuration, with what was overridden.
        stage: `source` or `adapt`.
        task: the task of `config`, which an override may have changed; the model is the run's own.
        tokenizer: the base model's.
        model: on the CPU, fp32, in evaluation mode, not prepared.
        source_names: the experts that its gates weigh, in the gates' order.
        checkpoint: the folder that the weights come from.
        progress: how far the run was at that checkpoint.
    """

    folder: Path
    config: RunConfig
    stage: str
    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: TrainedT5
    source_names: list[str]
    checkpoint: Path
    progress: Progress


def finished_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run left in its folder.

    Args:
        run_dir: the run's output folder.
        overrides: `--field value` pairs, as on the command line: another task or data, where base
            model and bank lie now, batch size, beams. Another task does not inherit the run's
            `data_dir` and `task_file`.

    Raises:
        FinishedError: the folder holds no run, or none that has a checkpoint yet.
        ConfigError: `config.yaml` or an override is wrong.
        StorageError: the checkpoint's manifest is damaged.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise FinishedError(
            f"{run_dir}: holds no run ({CONFIG} is missing); give the output_dir of `pemt adapt` or `pemt source`"
        )
    _, _, stage = _best_checkpoint(Path(run_dir))
    kind: type[RunConfig] = SourceConfig if stage == "source" else AdaptConfig
    arguments = ["--config", str(path)]
    config = parse_config(kind, [*arguments, *overrides], prog="pemt evaluate")
    if config.task_name != parse_config(kind, arguments, prog="pemt evaluate").task_name:
        arguments += ["--data_dir", "null", "--task_file", "null"]
        config = parse_config(kind, [*arguments, *overrides], prog="pemt evaluate")
    return replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)


def load_finished(run_dir: str | Path, config: RunConfig | None = None) -> LoadedRun:
    """A run's model with the weights of its best checkpoint; every rank reads the files.

    Args:
        run_dir: the run's output folder.
        config: what `finished_config` gave; default: the run's own.

    Raises:
        FinishedError: as `finished_config`; or the base model's weights are others than the run's.
        PemtError: base model, bank, task or checkpoint cannot be read, or do not go together any more.
    """
    own = finished_config(run_dir)
    config = config or own
    checkpoint, progress, stage = _best_checkpoint(Path(run_dir))
    manifest = read_manifest(checkpoint)
    # The prompt is as long as the description that the run started it from, whatever task is scored now.
    same_task = config.task_name == own.task_name  # its file may lie elsewhere by now
    own_task = get_task(own.task_name, config.task_file if same_task else own.task_file)
    base, tokenizer = load_base(config)
    if base_digest(checked_base(base)) != manifest["run"].get("base_sha256"):
        raise FinishedError(
            f"{checkpoint}: was trained on other weights than those of {config.model_name_or_path}; "
            "give the base model of the run with --model_name_or_path"
        )
    as_trained = config
    if isinstance(config, AdaptConfig) and config.method == "pemt":
        # The bank may have more entries by now.
        as_trained = replace(config, source_tasks=list(manifest["run"]["sources"]))
    description = getattr(own, "description", None) or own_task.description
    built = build_model(as_trained, base=base, tokenizer=tokenizer, description=description)
    weights = read_tensors(checkpoint, WEIGHTS, manifest)
    load_trained(weights, dict(built.model.trainable_parameters()), where=str(checkpoint))
    return LoadedRun(
        folder=Path(run_dir),
        config=config,
        stage=stage,
        task=get_task(config.task_name, config.task_file),
        tokenizer=tokenizer,
        model=built.model.eval(),
        source_names=built.source_names,
        checkpoint=checkpoint,
        progress=progress,
    )


def prepare_finished(finished: LoadedRun, engine: Engine) -> None:
    """Hand the model to the engine for evaluation.

    As in training, with an optimizer that takes no step: every DeepSpeed JSON that trains also evaluates.
    """
    trained = [parameter for _, parameter in finished.model.trainable_parameters()]
    optimizer = torch.optim.AdamW(trained, lr=finished.config.learning_rate)
    engine.prepare(finished.model, optimizer, read_lazy=read_lazy)


def _best_checkpoint(folder: Path) -> tuple[Path, Progress, str]:
    """The best validated checkpoint (the newest where nothing was validated), its progress and stage."""
    folders = checkpoint_folders(folder)
    if not folders:
        raise FinishedError(f"{folder}: holds a run without a checkpoint; train it first")
    newest = progress_of(read_manifest(folders[-1]))
    best = folder / f"checkpoint-{newest.best_step}"
    chosen = best if newest.best_step is not None and best.is_dir() else folders[-1]
    manifest = read_manifest(chosen)
    run = manifest.get("run")
    if not isinstance(run, dict) or run.get("stage") not in ("source", "adapt"):
        raise FinishedError(f"{chosen}: tells no stage; it was written by another version")
    return chosen, progress_of(manifest), run["stage"]
