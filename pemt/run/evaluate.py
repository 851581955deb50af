"""Evaluation: generate, score, and measure loss and gates, each example exactly once.

Shapes: B batch, T target tokens, V vocabulary, N examples, L sites with a gate, K sources.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pemt.config import RunConfig
from pemt.data import IGNORED_LABEL, collate, eval_batches, label_ids, lengths_of
from pemt.engine import Engine
from pemt.model import TrainedT5
from pemt.monitor import EvaluationBar
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
    config: RunConfig,
    metrics: Mapping[str, Metric] | None = None,
    by_likelihood: bool = False,
    description: str = "evaluating",
    on_batch_end: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score the prepared model on a data set (all ranks call).

    Args:
        engine: holds the model, after `prepare`.
        dataset: tokenised examples, as `load_task_data` gives them.
        task: tells metrics and the longest answer.
        metrics: a caller's own, as `score` takes them.
        by_likelihood: score the most likely label as well; the task must have labels.
        description: what the bar on rank 0 calls it.
        on_batch_end: called by all ranks after each batch; what it raises ends the evaluation.
    """
    started = time.perf_counter()
    labels = label_ids(task, tokenizer) if by_likelihood else []
    columns = _with_bar(
        engine,
        dataset,
        config,
        description=f"{description} {task.name}",
        measure=partial(_measure, engine, dataset, task, tokenizer, config, labels),
        on_batch_end=on_batch_end,
    )
    predictions = tokenizer.batch_decode(columns["tokens"], skip_special_tokens=True)
    likely = [task.labels[i] for i in columns["log_likelihoods"].argmax(dim=1)] if labels else None
    loss = float(columns["loss"].sum() / columns["target_tokens"].sum().clamp(min=1))
    # Rank 0's for all: CPUs of different kinds add up in different orders, and the best checkpoint hangs on both.
    scores, likely_scores, loss = engine.on_rank0(
        lambda: (*_scored(task, predictions, likely, dataset, metrics), loss),
        f"scoring {len(predictions)} answers",
    )
    return Evaluation(
        metrics=scores,
        loss=loss,
        gates_NLK=columns.get("gates"),
        predictions=predictions,
        by_likelihood=likely_scores,
        runtime=time.perf_counter() - started,
    )


def _with_bar(
    engine: Engine,
    dataset: Dataset,
    config: RunConfig,
    *,
    description: str,
    measure: Callable[[list[int]], dict[str, Tensor]],
    on_batch_end: Callable[[], None],
) -> dict[str, Tensor]:
    """`map_over_ranks` with a bar on rank 0."""
    batch_size = config.per_device_eval_batch_size
    with EvaluationBar(total=len(dataset), description=description, shown=engine.is_main) as bar:

        def after_batch() -> None:
            bar.advance(batch_size * engine.world_size)
            on_batch_end()

        return map_over_ranks(
            engine,
            lengths_of(dataset),
            batch_size=batch_size,
            measure=measure,
            on_batch_end=after_batch,
        )


def _scored(
    task: Task,
    predictions: list[str],
    likely: list[str] | None,
    dataset: Dataset,
    metrics: Mapping[str, Metric] | None,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Scores by generation, and by likelihood where that was asked for."""
    generated = score(task, predictions, dataset, metrics)
    return generated, None if likely is None else score(task, likely, dataset, metrics)


def map_over_ranks(
    engine: Engine,
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    measure: Callable[[list[int]], dict[str, Tensor]],
    on_batch_end: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Measure every example on one of the ranks, without gradients and dropout, and gather it (all ranks call).

    Args:
        engine: holds the model, after `prepare`.
        lengths: source tokens of each example, [N].
        batch_size: examples of a rank's batch.
        measure: takes a batch's indices and gives tensors [B,...] by name, of the same shape for every batch but for B.
        on_batch_end: as in `evaluate`.

    Returns:
        The same tensors for all examples, [N,...], in their order, on the CPU of every rank.
    """
    module = engine.module
    was_training = module.training
    module.eval()
    batches = eval_batches(
        lengths, batch_size=batch_size, world_size=engine.world_size, rank=engine.rank
    )
    gathered: list[dict[str, Tensor]] = []
    for indices in batches:
        # Blocks that are compiled for training run as written here: generation has too many shapes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            measured = {INDEX: torch.tensor(indices, device=engine.device), **measure(indices)}
        # The last batch may be short on one rank alone, and gathering needs equal shapes.
        short = batch_size - len(indices)
        gathered.append(
            {name: engine.gather(_pad_rows(each, short)).cpu() for name, each in measured.items()}
        )
        on_batch_end()
    module.train(was_training)
    columns = {name: torch.cat([each[name] for each in gathered]) for name in gathered[0]}
    order_N = _first_occurrences(columns.pop(INDEX), len(lengths))
    return {name: column[order_N] for name, column in columns.items()}


def _measure(
    engine: Engine,
    dataset: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    labels: list[list[int]],
    indices: list[int],
) -> dict[str, Tensor]:
    """Of one batch: generated `tokens` [B,T]; summed `loss` and counted `target_tokens` [B]; `log_likelihoods` [B,C] of
    labels if there are any; and the forward pass's `gates` [B,L,K], with experts."""
    batch = collate(
        list(dataset.select(indices)),
        pad_token_id=tokenizer.pad_token_id,
        pad_to_multiple_of=config.pad_to_multiple_of,
        device=engine.device,
    )
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
    if out.gates_BLK is not None:  # in place of the generation's
        measured["gates"] = out.gates_BLK.float()
    return measured


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


def _pad_rows(tensor: Tensor, count: int) -> Tensor:
    filler = tensor.new_full((count, *tensor.shape[1:]), NO_EXAMPLE)
    return torch.cat([tensor, filler])


def _first_occurrences(indices_N: Tensor, count: int) -> Tensor:
    """Positions of examples 0 … count-1: ranks repeat examples to stay in step, each counts once."""
    positions: dict[int, int] = {}
    for position, index in enumerate(indices_N.tolist()):
        if index != NO_EXAMPLE:
            positions.setdefault(index, position)
    assert len(positions) == count, "the ranks' batches do not cover the data set"
    return torch.tensor([positions[index] for index in range(count)])
