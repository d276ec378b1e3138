"""Padding, micro-batches, and the order of rows over epochs."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.batches import EpochOrder, collate, micro_batches, pad, shuffled
from posttrain.data.tokens import Tokens


def test_collate_by_hand() -> None:
    batch = collate([Tokens((5, 6), (7, 8, 2)), Tokens((9,), (2,))])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 2], [9, 2, 0, 0, 0]]
    assert batch.targets.tolist() == [[7, 8, 2], [2, 0, 0]]
    # the hidden state at `source` predicts the target: the token before it
    assert batch.source.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.last.tolist() == [4, 1]


def test_masks_come_from_lengths_and_never_from_ids() -> None:
    # 0 is the padding id of `collate`, 2 the end of sequence: both are real tokens inside a row
    batch = collate([Tokens((0, 0), (0, 2, 0)), Tokens((1,), (2, 2))])
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    assert batch.last.tolist() == [4, 2]


def test_an_empty_response_is_a_fully_masked_row() -> None:
    batch = collate([Tokens((4, 5), ())])
    assert batch.mask.tolist() == [[False]]
    assert batch.last.tolist() == [1]


def test_pad_by_hand() -> None:
    assert pad([[1.0, 2.0], [], [3.0]], 3).tolist() == [[1.0, 2.0, 0.0], [0.0] * 3, [3.0, 0.0, 0.0]]
    assert pad([[1.0]], 1).dtype == torch.float32


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = micro_batches(lengths, budget)
    assert Counter(i for group in groups for i in group) == Counter(range(len(lengths)))
    assert groups
    for group in groups:
        cost = len(group) * max((lengths[i] for i in group), default=0)
        assert cost <= budget or len(group) == 1
    assert all(groups) or groups == [[]]


@given(st.integers(1, 40), st.integers(1, 15), st.integers(1, 4), st.integers(0, 99))
def test_an_epoch_skips_no_row_and_repeats_none(rows: int, batch_size: int, epochs: int, seed: int) -> None:
    order = EpochOrder(rows, batch_size, epochs, seed)
    drawn = [order.indices(step) for step in range(order.steps)]
    assert order.steps == epochs * -(-rows // batch_size)
    for epoch in range(epochs):
        batches = drawn[epoch * order.steps_per_epoch : (epoch + 1) * order.steps_per_epoch]
        assert sorted(i for batch in batches for i in batch) == list(range(rows))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


def test_the_order_is_a_pure_function_of_seed_and_epoch() -> None:
    assert shuffled(20, 3, 1) == shuffled(20, 3, 1)
    assert len({tuple(shuffled(20, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert EpochOrder(20, 6, 2, 5).indices(5) == EpochOrder(20, 6, 2, 5).indices(5)
