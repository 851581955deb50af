"""Batches: every example, the same step however the work is divided, little padding, resumable."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pemt.data import TrainBatches, collate, eval_batches
from pemt.data.batching import MAX_KEPT, MAX_OVER_LEAST, MAX_WASTE, share_kept_together

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


def micro_batches(train, epoch):
    """An epoch's micro-batches of one rank."""
    return list(chain.from_iterable(train.epoch(epoch)))


@settings(max_examples=100, deadline=None)
@given(lengths_lists, small, small, st.integers(0, 3))
def test_an_epoch_shows_every_example_once_in_batches_of_about_the_size_asked_for(
    lengths, size, micro, epoch
):
    train = batches(lengths, batch_size=size, accumulation=micro)
    steps = list(train.epoch(epoch))
    assert len(steps) == train.steps_per_epoch == -(-len(lengths) // (size * micro))
    assert all(len(step) == micro for step in steps)
    counts = Counter(flat(steps))
    assert set(counts) == set(range(len(lengths)))
    sizes = [len(each) for step in steps for each in step]
    assert min(sizes) >= 1
    assert max(sizes) <= size
    if len(lengths) >= len(sizes):
        assert set(counts.values()) == {1}
        # None has less than half, or less than its share of what there is.
        assert min(sizes) >= min(size - size // 2, len(lengths) // len(sizes))
    else:
        assert set(sizes) == {1}


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


@pytest.mark.parametrize(
    ("examples", "batch_size", "micro", "most_kept"),
    [
        (4000, 32, 1, MAX_KEPT),
        (4000, 32, 4, MAX_KEPT),
        (4000, 128, 1, 0.5),  # what the padding of 128 so different texts leaves room for
        (250, 32, 1, 0.8),  # cannot come below MAX_WASTE at all
        (60, 16, 1, 0.8),
    ],
)
def test_companions_change_from_epoch_to_epoch_as_far_as_padding_allows(
    examples, batch_size, micro, most_kept
):
    lengths = np.random.default_rng(1).lognormal(4, 0.6, examples).astype(int).clip(1, 256)
    train = batches(lengths, batch_size=batch_size, accumulation=micro)
    epochs = [micro_batches(train, epoch) for epoch in (1, 2, 3)]
    assert max(share_kept_together(*epochs[i : i + 2]) for i in (0, 1)) < most_kept + 0.05
    least = train.waste(train.in_order(0, 0.0))
    limit = MAX_WASTE if least <= MAX_WASTE else MAX_OVER_LEAST * least
    assert max(map(train.waste, epochs)) < limit + 0.01


def test_texts_of_one_length_are_shuffled_freely():
    train = batches([20] * 640, batch_size=32)
    assert share_kept_together(micro_batches(train, 0), micro_batches(train, 1)) < 0.08  # 31 / 639
    assert train.waste(micro_batches(train, 0)) == 0


def test_companions_by_hand():
    before = [[0, 1], [2, 3, 4]]
    assert share_kept_together(before, [[0, 1], [2], [3], [4]]) == 2 / 8
    assert share_kept_together(before, [[4, 0, 1], [3, 2]]) == 4 / 8
    assert share_kept_together([[i] for i in range(5)], before) == 0


def test_waste_counts_padding_and_examples_shown_twice():
    train = batches([2, 2, 4, 4], batch_size=2)
    assert train.waste([[0, 1], [2, 3]]) == 0
    assert train.waste([[0, 2], [1, 3]]) == pytest.approx(4 / 16)
    assert train.waste([[0, 1], [2, 3], [2, 2]]) == pytest.approx(8 / 20)


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


def test_random_order_would_waste_much():
    lengths = np.random.default_rng(1).lognormal(4, 0.6, 4000).astype(int).clip(1, 256)
    random = np.random.default_rng(0).permutation(4000).reshape(125, 32)
    assert batches(lengths, batch_size=32).waste(random) > 0.4


@settings(max_examples=40, deadline=None)
@given(lengths_lists, small, st.integers(1, 4))
def test_evaluation_sees_every_index_on_equally_many_batches_per_rank(lengths, size, world_size):
    ranks = [
        eval_batches(lengths, batch_size=size, world_size=world_size, rank=rank)
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
            for batch in eval_batches(lengths, batch_size=8, world_size=world_size, rank=rank)
        }

    assert composition(1) == composition(2) == composition(3)


def test_collate_pads_right():
    rows = [{"input_ids": [5, 6, 1], "labels": [9, 1]}, {"input_ids": [7] * 9, "labels": [1]}]
    batch = collate(rows, pad_token_id=0)
    on_meta = collate(rows, pad_token_id=0, device="meta")
    assert {each.device.type for each in on_meta.values()} == {"meta"}
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
