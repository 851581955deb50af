"""Padding of real training sets in random order and in ours, and how much of a batch comes together again.

    python -m tests.measure.padding [FOLDER OF THE REAL DATA]

Prints the table of LOG.md: shares of source tokens in percent, means of three epochs; `kept` is
`share_kept_together` of two epochs. Random order is the published code's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pemt.data import TrainBatches
from pemt.data.batching import share_kept_together
from pemt.data.local_files import read_rows
from pemt.data.vocabulary import encode_sources
from pemt.model.tokenizer import load_tokenizer
from pemt.tasks import example_of, get_task

SETS = {
    "RTE": ("superglue-rte", "superglue/RTE/train.jsonl"),
    "SST-2 (slice)": ("sst2", "glue/SST-2/train.slice.tsv"),
    "BoolQ (slice)": ("superglue-boolq", "superglue/BoolQ/val.slice.jsonl"),
    "CB": ("superglue-cb", "superglue/CB/train.jsonl"),
}
SOURCE_LENGTH = 256
EPOCHS = range(3)


def main(data: Path) -> None:
    tokenizer = load_tokenizer(str(data / "t5_tokenizer"))
    print(
        "| set | examples | batch | ranks | random | least | ours | widths in 8s | random kept | kept |"
    )
    print("|---|" + "---:|" * 9)
    for name, (task, file) in SETS.items():
        rows = [
            example_of(get_task(task), row) for _, row in read_rows(get_task(task), [data / file])
        ]
        sources = [row["source"] for row in rows if row is not None]
        ids, _ = encode_sources(sources, tokenizer, max_length=SOURCE_LENGTH)
        lengths = np.array([len(each) for each in ids])
        for batch_size in (32, 128):
            for ranks in (1, 8):
                print(
                    f"| {name} | {len(lengths)} | {batch_size} | {ranks} | {line(lengths, batch_size, ranks)} |"
                )


def line(lengths: np.ndarray, batch_size: int, ranks: int) -> str:
    """The measured columns."""
    train = TrainBatches(
        lengths, batch_size=batch_size, accumulation=ranks, world_size=1, rank=0, seed=42
    )
    ours = [[each for step in train.epoch(epoch) for each in step] for epoch in EPOCHS]
    draw = np.random.default_rng(42)
    cuts = range(batch_size, len(lengths), batch_size)
    random = [np.split(draw.permutation(len(lengths)), cuts) for _ in EPOCHS]
    wasted = [
        np.mean([train.waste(epoch) for epoch in random]),
        train.waste(train.in_order(0, 0.0)),
        np.mean([train.waste(epoch) for epoch in ours]),
        np.mean([in_eights(lengths, epoch) for epoch in ours]),
        share_kept_together(*random[:2]),
        share_kept_together(*ours[:2]),
    ]
    return " | ".join(f"{100 * share:.1f}" for share in wasted)


def in_eights(lengths: np.ndarray, micro_batches: Sequence[Sequence[int]]) -> float:
    """What is wasted where widths are rounded up to multiples of 8."""
    padded = sum(len(each) * -(-lengths[each].max() // 8) * 8 for each in micro_batches)
    return 1 - float(lengths.sum() / padded)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[3] / "shared" / "data")
