"""Evaluation: generate, score, and measure loss and gates, each example exactly once.

Shapes: B batch, T target tokens, V vocabulary, N examples, L sites with a gate, K sources.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pemt.data import IGNORED_LABEL, collate, eval_batches, label_ids, lengths_of
from pemt.engine import Engine
from pemt.model import TrainedT5
from pemt.monitor import EvaluationBar
from pemt.run.prepare import Setup
from pemt.run.session import Session
from pemt.tasks import Metric, Task, longest_target, score

INDEX, NO_EXAMPLE = "index", -1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over a data set gave; equal on every rank but for the time it took.

    Args:
        metrics: the task's metrics in percent, and their mean as `average_metrics`.
        loss: cross-entropy per target token, teacher forced.
        gates_NLK: every example's gates, in the data set's order; None without experts to mix.
        predictions: decoded generations, in the data set's order.
        by_likelihood: the metrics of the most likely labels in their place; None where that was not asked for.
        runtime: seconds.
    """

    metrics: dict[str, float]
    loss: float
    gates_NLK: Tensor | None
    predictions: list[str]
    runtime: float
    by_likelihood: dict[str, float] | None = None

    @property
    def gates_LK(self) -> Tensor | None:
        """The mean gate of every site and source."""
        return None if self.gates_NLK is None else self.gates_NLK.mean(dim=0)

    @property
    def samples_per_second(self) -> float:
        """Examples answered per second, of all ranks together."""
        return len(self.predictions) / self.runtime


def evaluate(
    engine: Engine,
    dataset: Dataset,
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    metrics: Mapping[str, Metric] | None = None,
    by_likelihood: bool = False,
    description: str = "evaluating",
    on_batch_end: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score the prepared model on a data set (all ranks call).

    Args:
        engine: holds the model, after `prepare`, and the run's configuration.
        dataset: tokenised examples, as `load_task_data` gives them.
        task: tells metrics and the longest answer.
        metrics: a caller's own, as `score` takes them.
        by_likelihood: score the most likely label as well; the task must have labels.
        description: what the bar on rank 0 calls it.
        on_batch_end: called by all ranks after each batch; what it raises ends the evaluation.
    """
    started = time.perf_counter()
    labels = label_ids(task, tokenizer) if by_likelihood else []
    columns = map_over_ranks(
        engine,
        dataset,
        lengths_of(dataset),
        tokenizer,
        partial(_measure, engine, task, labels),
        description=f"{description} {task.name}",
        on_batch_end=on_batch_end,
    )
    answers = [tokenizer.batch_decode(columns["tokens"], skip_special_tokens=True)]
    if labels:
        answers.append([task.labels[i] for i in columns["log_likelihoods"].argmax(dim=1)])
    loss = float(columns["loss"].sum() / columns["target_tokens"].sum().clamp(min=1))
    # Rank 0's for all: CPUs of different kinds add up in different orders, and the best checkpoint hangs on both.
    (scores, *likely_scores), loss = engine.on_rank0(
        lambda: ([score(task, each, dataset, metrics) for each in answers], loss),
        f"scoring {len(dataset)} answers",
    )
    return Evaluation(
        metrics=scores,
        loss=loss,
        gates_NLK=columns.get("gates"),
        predictions=answers[0],
        by_likelihood=likely_scores[0] if likely_scores else None,
        runtime=time.perf_counter() - started,
    )


def evaluate_set(setup: Setup, examples: Dataset, description: str, session: Session) -> Evaluation:
    """Score the model on one of the run's sets; a run that is told to stop ends there (all ranks call)."""
    return evaluate(
        setup.engine,
        examples,
        task=setup.task,
        tokenizer=setup.tokenizer,
        metrics=setup.caller.metrics,
        description=description,
        on_batch_end=session.raise_if_stopped,
    )


def gates_and_similarity(engine: Engine, evaluated: Evaluation) -> tuple[Tensor, Tensor] | None:
    """Of an evaluation just done, gates [N,L,K] and prompt similarity [1+K,1+K]; None without experts."""
    assert isinstance(engine.module, TrainedT5)
    similarity_MM = engine.module.prompt_similarity()
    if evaluated.gates_NLK is None or similarity_MM is None:
        return None
    return evaluated.gates_NLK, similarity_MM.cpu()


def map_over_ranks(
    engine: Engine,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    lengths: Sequence[int] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    measure: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    batch_size: int | None = None,
    description: str = "",
    on_batch_end: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Measure every row on one of the ranks, without gradients and dropout, and gather it (all ranks call).

    Args:
        engine: holds the model, after `prepare`.
        rows: token ids, as `collate` takes them.
        lengths: source tokens of each, [N].
        measure: gives tensors [B,...] of a batch by name, of the same shape for every batch but for B.
        batch_size: rows of a rank's batch; default: per_device_eval_batch_size.
        description: of a bar over the rows, on rank 0; empty for none.
        on_batch_end: as in `evaluate`.

    Returns:
        The same tensors for all rows, [N,...], in their order, on the CPU of every rank.
    """
    module, size = engine.module, batch_size or engine.config.per_device_eval_batch_size
    was_training = module.training
    module.eval()
    batches = eval_batches(lengths, batch_size=size, world_size=engine.world_size, rank=engine.rank)
    gathered: list[dict[str, Tensor]] = []
    shown = engine.is_main and description != ""
    with EvaluationBar(total=len(rows), description=description, shown=shown) as bar:
        for indices in batches:
            batch = collate(
                [rows[i] for i in indices],
                pad_token_id=tokenizer.pad_token_id,
                pad_to_multiple_of=engine.config.pad_to_multiple_of,
                device=engine.device,
            )
            # Blocks that are compiled for training run as written here: generation has too many shapes.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                measured = {INDEX: torch.tensor(indices, device=engine.device), **measure(batch)}
            gathered.append(_gathered(engine, measured, size - len(indices)))
            bar.advance(size * engine.world_size)
            on_batch_end()
    module.train(was_training)
    columns = {name: torch.cat([each[name] for each in gathered]) for name in gathered[0]}
    order_N = _first_occurrences(columns.pop(INDEX), len(rows))
    return {name: column[order_N] for name, column in columns.items()}


def _gathered(engine: Engine, measured: dict[str, Tensor], short: int) -> dict[str, Tensor]:
    """Every rank's rows; the last batch may be short on one rank alone, and gathering needs equal shapes."""
    found = {}
    for name, rows in measured.items():
        filler = rows.new_full((short, *rows.shape[1:]), NO_EXAMPLE)
        found[name] = engine.gather(torch.cat([rows, filler])).cpu()
    return found


def _measure(
    engine: Engine, task: Task, labels: list[list[int]], batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of one batch: generated `tokens` [B,T]; summed `loss` and counted `target_tokens` [B]; `log_likelihoods` [B,C] of
    labels if there are any; and the forward pass's `gates` [B,L,K], with experts."""
    config = engine.config
    labels_BT = batch["labels"]
    out = engine.model(**batch)
    loss_BT = F.cross_entropy(
        out.logits.float().transpose(1, 2), labels_BT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    longest = longest_target(task, config.max_target_length)
    measured = generate_batch(engine, batch, longest=longest, num_beams=config.num_beams)
    if labels:
        measured |= score_labels(engine, batch, labels)
    counted_B = (labels_BT != IGNORED_LABEL).sum(dim=1)
    measured |= {"loss": loss_BT.sum(dim=1), "target_tokens": counted_B}
    return {**measured, **_gates(out.gates_BLK)}  # in place of the generation's


def generate_batch(
    engine: Engine, batch: dict[str, Tensor], *, longest: int, num_beams: int
) -> dict[str, Tensor]:
    """The answers to a batch: `tokens` [B, longest + 1], the decoder's start first, padded on the right; and of the
    same pass `gates` [B,L,K], with experts."""
    module = engine.module
    assert isinstance(module, TrainedT5)
    with engine.autocast():
        tokens_BT, gates_BLK = module.generate_with_gates(
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=longest,
            num_beams=num_beams,
            do_sample=False,
            # Under ZeRO-3 every step of generation gathers weights: ranks must take equally many.
            synced_gpus=engine.zero_stage == 3 and engine.world_size > 1,
        )
    padding = longest + 1 - tokens_BT.shape[1]
    padded_BT = F.pad(tokens_BT, (0, padding), value=module.base.generation_config.pad_token_id)
    return {"tokens": padded_BT, **_gates(gates_BLK)}


def score_labels(
    engine: Engine, batch: dict[str, Tensor], labels: list[list[int]]
) -> dict[str, Tensor]:
    """`log_likelihoods` of each label after each input of a batch [B,C], fp32; and of the same pass `gates` [B,L,K],
    with experts."""
    module = engine.module
    assert isinstance(module, TrainedT5)
    with engine.autocast():
        scores_BC, gates_BLK = module.label_log_likelihoods(
            batch["input_ids"], batch["attention_mask"], labels
        )
    return {"log_likelihoods": scores_BC, **_gates(gates_BLK)}


def _gates(gates_BLK: Tensor | None) -> dict[str, Tensor]:
    return {} if gates_BLK is None else {"gates": gates_BLK.float()}


def _first_occurrences(indices_N: Tensor, count: int) -> Tensor:
    """Positions of examples 0 … count-1: ranks repeat examples to stay in step, each counts once."""
    found, firsts = np.unique(indices_N.numpy(), return_index=True)
    order = firsts[found != NO_EXAMPLE]
    assert len(order) == count, "the ranks' batches do not cover the data set"
    return torch.from_numpy(order)
