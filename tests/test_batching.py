"""Batches: every example, the same step however the work is divided, little padding, resumable."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pemt.data import EvalBatches, TrainBatches, collate

lengths_lists = st.lists(st.integers(1, 256), min_size=1, max_size=120)
small = st.integers(1, 5)


def batches(lengths, *, batch_size, accumulation=1, world_size=1, rank=0, seed=7):
    return TrainBatches(
        lengths,
        batch_size=batch_size,
        accumulation=accumulation,
        world_size=world_size,
        rank=rank,
        seed=seed,
    )


def flat(steps):
    return [index for step in steps for micro_batch in step for index in micro_batch]


@settings(max_examples=60, deadline=None)
@given(lengths_lists, small, small, st.integers(0, 3))
def test_an_epoch_shows_every_example_and_fills_only_the_last_global_batch(
    lengths, size, micro, epoch
):
    train = batches(lengths, batch_size=size, accumulation=micro)
    steps = list(train.epoch(epoch))
    assert len(steps) == train.steps_per_epoch == -(-len(lengths) // (size * micro))
    assert all(len(step) == micro and all(len(m) == size for m in step) for step in steps)
    counts = Counter(flat(steps))
    assert set(counts) == set(range(len(lengths)))
    assert sum(counts.values()) - len(lengths) < size * micro


@settings(max_examples=40, deadline=None)
@given(lengths_lists, small, st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(0, 2))
def test_any_division_of_the_work_computes_the_same_steps(lengths, size, division, epoch):
    world_size, accumulation = division
    whole = list(batches(lengths, batch_size=size, accumulation=4).epoch(epoch))
    ranks = [
        list(
            batches(
                lengths,
                batch_size=size,
                accumulation=accumulation,
                world_size=world_size,
                rank=rank,
            ).epoch(epoch)
        )
        for rank in range(world_size)
    ]
    joined = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert joined == whole


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(5, 200, 500)
    orders = {
        (seed, epoch): flat(batches(lengths, batch_size=8, seed=seed).epoch(epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert orders[1, 1] == flat(batches(lengths, batch_size=8, seed=1).epoch(1))


def test_batches_are_mixed_anew_each_epoch():
    lengths = np.random.default_rng(0).integers(5, 200, 2000)
    train = batches(lengths, batch_size=8)
    first, second = ({frozenset(m[0]) for m in train.epoch(epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 10


@pytest.mark.parametrize("start", [0, 1, 5, 62, 63])
def test_an_epoch_can_be_resumed_at_any_step(start):
    train = batches(list(range(1, 501)), batch_size=4, accumulation=2)
    assert list(train.epoch(3, start)) == list(train.epoch(3))[start:]


def test_micro_batches_of_a_step_are_about_equally_long_on_every_rank():
    lengths = np.random.default_rng(1).lognormal(4, 0.6, 4000).astype(int) + 1
    ranks = [
        [
            lengths[step[0]].max()
            for step in batches(lengths, batch_size=16, world_size=2, rank=r).epoch(0)
        ]
        for r in (0, 1)
    ]
    ratio = np.maximum(*ranks) / np.minimum(*ranks)
    assert np.median(ratio) < 1.02


def test_bucketing_wastes_little():
    lengths = np.random.default_rng(1).lognormal(4, 0.6, 4000).astype(int).clip(1, 256)
    train = batches(lengths, batch_size=32)
    assert train.waste(np.array(list(train.epoch(0)))) < 0.05
    random = np.random.default_rng(0).permutation(4000).reshape(125, 1, 32)
    assert train.waste(random) > 0.4


@settings(max_examples=40, deadline=None)
@given(lengths_lists, small, st.integers(1, 4))
def test_evaluation_sees_every_index_on_equally_many_batches_per_rank(lengths, size, world_size):
    ranks = [
        list(EvalBatches(lengths, batch_size=size, world_size=world_size, rank=rank))
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    seen = {index for rank in ranks for batch in rank for index in batch}
    assert seen == set(range(len(lengths)))


def test_evaluation_pads_the_same_examples_together_on_any_number_of_ranks():
    lengths = np.random.default_rng(0).integers(1, 100, 101)

    def composition(world_size):
        return {
            tuple(batch)
            for rank in range(world_size)
            for batch in EvalBatches(lengths, batch_size=8, world_size=world_size, rank=rank)
        }

    assert composition(1) == composition(2) == composition(3)


def test_collate_pads_right():
    rows = [{"input_ids": [5, 6, 1], "labels": [9, 1]}, {"input_ids": [7] * 9, "labels": [1]}]
    batch = collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1, *[0] * 6], [7] * 9]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    assert batch["labels"].tolist() == [[9, 1], [1, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_collate_pads_to_a_multiple():
    rows = [{"input_ids": [5, 6, 1], "labels": [9, 1]}, {"input_ids": [7] * 9, "labels": [1]}]
    batch = collate(rows, pad_token_id=0, pad_to_multiple_of=8)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    assert batch["labels"].tolist() == [[9, 1] + [-100] * 6, [1] + [-100] * 7]
