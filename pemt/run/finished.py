"""A finished run, loaded from its folder: configuration, task, tokenizer, model with the best weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pemt.checkpoint import WEIGHTS, load_lazily
from pemt.config import AdaptConfig, RunConfig
from pemt.engine import Engine
from pemt.model import (
    base_digest,
    checked_base,
    fetch_base,
    load_pretrained,
    materialize_all,
    read_lazy,
)
from pemt.run.build import BuiltModel, build_model, build_ops
from pemt.run.finished_config import FinishedError, best_checkpoint, finished_config, task_of_run
from pemt.storage import open_tensors
from pemt.tasks import Task, longest_target


@dataclass(frozen=True, kw_only=True)
class LoadedRun(BuiltModel):
    """A run with its best weights; its model is on the CPU, fp32, in evaluation mode, not prepared.

    Args:
        folder: the run's output folder.
        config: its configuration, with what was overridden.
        task: the task of `config`, which an override may have changed; the model is the run's own.
        tokenizer: the base model's.
        checkpoint: the folder that the weights come from.
    """

    folder: Path
    config: RunConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Path


def load_finished(run_dir: str | Path, config: RunConfig | None = None) -> LoadedRun:
    """A run's model with the weights of its best checkpoint; every rank reads the files.

    Args:
        run_dir: the run's output folder.
        config: what `finished_config` gave; default: the run's own.

    Raises:
        FinishedError: as `finished_config`; or the base model's weights are others than the run's.
        PemtError: base model, bank, task or checkpoint cannot be read, or do not go together any more.
    """
    run_dir = Path(run_dir).expanduser()
    own = finished_config(run_dir)
    config = config or own
    checkpoint, manifest = best_checkpoint(run_dir)
    task = task_of_run(run_dir, config)
    # The prompt is as long as the description that the run started it from, whatever task is scored now.
    own_task = task if config.task_name == own.task_name else task_of_run(run_dir, own)
    base, tokenizer = load_pretrained(config.model_name_or_path, config.tokenizer_name)
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
    weights = open_tensors(checkpoint, WEIGHTS, manifest)
    load_lazily(weights, dict(built.model.trainable_parameters()))
    materialize_all(built.model)
    if task.max_target_length is None:  # open answers: what the run has measured
        length = manifest["run"].get("max_target_length")
        task = replace(task, max_target_length=longest_target(task, length))
    built.model.eval()
    return LoadedRun(
        **vars(built),
        folder=run_dir,
        config=config,
        task=task,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
    )


def load_on_all(run_dir: str | Path, config: RunConfig, engine: Engine) -> LoadedRun:
    """`load_finished` on every rank of a job; of a machine one alone fetches what is on the hub (all ranks call)."""
    with engine.local_first(f"fetching {config.model_name_or_path}"):
        fetch_base(config)
    with engine.together(f"reading {run_dir}"):
        return load_finished(run_dir, config)


def prepare_finished(finished: LoadedRun, engine: Engine) -> None:
    """Hand the model to the engine for evaluation.

    As in training, with an optimizer that takes no step: every DeepSpeed JSON that trains also evaluates.
    """
    build_ops(finished.config, engine)
    trained = [parameter for _, parameter in finished.model.trainable_parameters()]
    optimizer = torch.optim.AdamW(trained, lr=finished.config.learning_rate)
    engine.prepare(finished.model, optimizer, read_lazy=read_lazy)
