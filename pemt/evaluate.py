"""Evaluation: generate, score, and measure loss and gates, each example exactly once.

Shapes: B batch, T target tokens, V vocabulary, N examples, L all FFNs (encoder first), K experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pemt.config import RunConfig
from pemt.data import EvalBatches, collate, lengths_of
from pemt.engine import Engine
from pemt.model import TrainedT5
from pemt.tasks import Task, score

IGNORED_LABEL = -100
NO_EXAMPLE = -1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one pass over a data set gave; equal on every rank but for the time it took.

    Args:
        metrics: the task's metrics in percent, and their mean as `average_metrics`.
        loss: cross-entropy per target token, teacher forced.
        gates_LK: mean gate of every FFN and expert; None without experts to mix.
        predictions: decoded generations, in the data set's order.
        runtime: seconds.
    """

    metrics: dict[str, float]
    loss: float
    gates_LK: Tensor | None
    predictions: list[str]
    runtime: float

    @property
    def samples_per_second(self) -> float:
        return len(self.predictions) / self.runtime

    def moe_weights(self) -> list[float]:
        """Each expert's gate, averaged over all FFNs and examples: the published `moe_weight_k`."""
        return [] if self.gates_LK is None else self.gates_LK.mean(dim=0).tolist()


def evaluate(
    engine: Engine,
    dataset: Dataset,
    *,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
) -> Evaluation:
    """Score the prepared model on a data set (all ranks call).

    Args:
        engine: holds the model, after `prepare`.
        dataset: tokenised examples, as `load_task_data` gives them.
        task: tells metrics and the longest answer.
    """
    started = time.perf_counter()
    module = engine.module
    assert isinstance(module, TrainedT5)
    was_training = module.training
    module.eval()
    longest = config.max_target_length or task.max_target_length
    rows: list[list[Tensor]] = []
    batches = EvalBatches(
        lengths_of(dataset),
        batch_size=config.per_device_eval_batch_size,
        world_size=engine.world_size,
        rank=engine.rank,
    )
    for indices in batches:
        batch = {
            key: value.to(engine.device)
            for key, value in collate(
                list(dataset.select(indices)), pad_token_id=tokenizer.pad_token_id
            ).items()
        }
        measured = _measure(engine, module, batch, config=config, longest=longest)
        measured.insert(0, torch.tensor(indices, device=engine.device))
        # The last batch may be short on one rank alone, and gathering needs equal shapes.
        short = config.per_device_eval_batch_size - len(indices)
        rows.append([engine.gather(_pad_rows(each, short)).cpu() for each in measured])
    module.train(was_training)
    indices_N, tokens_NT, loss_N, targets_N, *gates = (
        torch.cat(column) for column in zip(*rows, strict=True)
    )
    order_N = _first_occurrences(indices_N, len(dataset))
    predictions = tokenizer.batch_decode(tokens_NT[order_N], skip_special_tokens=True)
    metrics = engine.from_main(score(task, predictions, dataset) if engine.is_main else None)
    return Evaluation(
        metrics=metrics,
        loss=float(loss_N[order_N].sum() / targets_N[order_N].sum().clamp(min=1)),
        gates_LK=gates[0][order_N].mean(dim=0) if gates else None,
        predictions=predictions,
        runtime=time.perf_counter() - started,
    )


@torch.no_grad()
def _measure(
    engine: Engine, module: TrainedT5, batch: dict[str, Tensor], *, config: RunConfig, longest: int
) -> list[Tensor]:
    """Of one batch: generated ids [B,T], summed loss [B], counted targets [B], and gates [B,L,K] if any."""
    labels_BT = batch["labels"]
    out = engine.model(**batch)
    loss_BT = F.cross_entropy(
        out.logits.float().transpose(1, 2), labels_BT, ignore_index=IGNORED_LABEL, reduction="none"
    )
    with engine.autocast():
        tokens_BT = module.generate(
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=longest,
            num_beams=config.num_beams,
            do_sample=False,
            # Under ZeRO-3 every step of generation gathers weights: ranks must take equally many.
            synced_gpus=engine.zero_stage == 3 and engine.world_size > 1,
        )
    padded_BT = F.pad(
        tokens_BT, (0, longest + 1 - tokens_BT.shape[1]), value=module.base.config.pad_token_id
    )
    counted_B = (labels_BT != IGNORED_LABEL).sum(dim=1)
    gates = [] if out.gates_LBK is None else [out.gates_LBK.float().transpose(0, 1)]
    return [padded_BT, loss_BT.sum(dim=1), counted_B, *gates]


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
