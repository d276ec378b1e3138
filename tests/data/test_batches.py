"""Padding, micro-batches, and the order of rows over epochs."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.batches import EpochOrder, collate, micro_batches, pad, share_of, shuffled
from posttrain.data.tokens import Tokens


def test_collate_by_hand() -> None:
    batch = collate([Tokens((5, 6), (7, 8, 2)), Tokens((9,), (2,))])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 2, 9, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.targets.tolist() == [[7, 8, 2], [2, 0, 0]]
    # the hidden state at `source` predicts the target: the token before it
    assert batch.source.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.last.tolist() == [4, 6]
    assert batch.rows.tolist() == [[0, 1, 2, 3, 4], [5, 6, 0, 0, 0]]
    assert batch.place.tolist() == [0, 1, 2, 3, 4, 5, 6]
    short, long = batch.parts
    assert (short.queries.tolist(), short.mask) == ([[5, 6]], None)
    assert (long.queries.tolist(), long.keys.tolist(), long.mask) == ([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]], None)


def test_answers_to_one_prompt_branch_off_from_its_only_copy() -> None:
    prompt = (5, 6, 7, 8)
    batch = collate([Tokens(prompt, (9, 2)), Tokens((4,), (2,)), Tokens(prompt, (3,)), Tokens(prompt, ())])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 2, 3, 4, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 0, 1]
    # both first answers are predicted by the same last token of the prompt
    assert batch.source.tolist() == [[3, 4], [7, 0], [3, 0], [0, 0]]
    assert batch.last.tolist() == [5, 8, 6, 3]
    assert batch.rows.tolist() == [[0, 1, 2, 3, 4, 5], [7, 8, 0, 0, 0, 0], [0, 1, 2, 3, 6, 0], [0, 1, 2, 3, 0, 0]]
    alone, stem, *answers = batch.parts
    assert (alone.queries.tolist(), stem.queries.tolist()) == ([[7, 8]], [[0, 1, 2, 3]])
    assert [part.queries.tolist() for part in answers] == [[[6]], [[4, 5]]]
    assert [part.keys.tolist() for part in answers] == [[[0, 1, 2, 3, 6]], [[0, 1, 2, 3, 4, 5]]]
    assert answers[1].mask is not None
    assert answers[1].mask.int().tolist() == [[[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]]]


def test_prompts_of_uneven_length_are_padded_where_their_answers_do_not_look() -> None:
    rows = [Tokens((3,) * 4, (2,)), Tokens((3,) * 4, (4,)), Tokens((5,) * 6, (2,)), Tokens((5,) * 6, (4,))]
    answers = collate(rows).parts[-1]
    assert answers.keys.tolist() == [
        [0, 0, 0, 1, 2, 3, 4],
        [0, 0, 0, 1, 2, 3, 5],
        [6, 7, 8, 9, 10, 11, 12],
        [6, 7, 8, 9, 10, 11, 13],
    ]
    assert answers.mask is not None
    assert answers.mask[:, 0, 0].int().tolist() == [[0, 0, 1, 1, 1, 1, 1]] * 2 + [[1] * 7] * 2


def tokens_laid_out(rows: list[Tokens]) -> int:
    return len(collate(rows).input_ids)


def test_masks_come_from_lengths_and_never_from_ids() -> None:
    # 0 is the padding id of `collate`, 2 the end of sequence: both are real tokens inside a row
    batch = collate([Tokens((0, 0), (0, 2, 0)), Tokens((1,), (2, 2))])
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    assert batch.last.tolist() == [4, 7]


def test_an_empty_response_is_a_fully_masked_row() -> None:
    batch = collate([Tokens((4, 5), ())])
    assert batch.mask.tolist() == [[False]]
    assert batch.last.tolist() == [1]


def test_pad_by_hand() -> None:
    assert pad([[1.0, 2.0], [], [3.0]], 3).tolist() == [[1.0, 2.0, 0.0], [0.0] * 3, [3.0, 0.0, 0.0]]
    assert pad([[1.0]], 1).dtype == torch.float32


a_row = st.builds(lambda p, r: Tokens((3,) * p, (4,) * r), st.integers(1, 9), st.integers(0, 20))


@given(st.lists(st.lists(a_row, min_size=1, max_size=3), max_size=20), st.integers(1, 120))
def test_micro_batches_hold_every_row_once_within_the_budget(rows: list[list[Tokens]], budget: int) -> None:
    groups = micro_batches(rows, budget)
    assert Counter(i for group in groups for i in group) == Counter(range(len(rows)))
    assert groups
    for group in groups if rows else []:
        assert tokens_laid_out([t for i in group for t in rows[i]]) <= budget or len(group) == 1
    assert all(groups) or groups == [[]]


@given(st.lists(a_row, max_size=20), st.integers(1, 4))
def test_processes_share_all_rows_and_keep_prompts_together_where_there_are_enough(
    rows: list[Tokens], processes: int
) -> None:
    shares = [share_of([[row] for row in rows], process, processes) for process in range(processes)]
    assert sorted(i for share in shares for i in share) == list(range(len(rows)))
    where = {(rows[i].prompt, process) for process, share in enumerate(shares) for i in share}
    prompts = {row.prompt for row in rows}
    assert len(where) == len(prompts) or len(prompts) < processes


def test_processes_get_about_as_many_tokens() -> None:
    """Prompts of 2 tokens: 11 | 10, then 7 to the second, 6 to the first, and 3 to the first again, for both have 17."""
    rows = [[Tokens((i, i), (7,) * length)] for i, length in enumerate((1, 4, 9, 5, 8))]
    assert share_of(rows, 0, 2) == [0, 1, 2]
    assert share_of(rows, 1, 2) == [3, 4]


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
    assert shuffled(1_000_000, 3, 1) is shuffled(1_000_000, 3, 1), "one permutation per epoch, not one per draw"
    assert sorted(shuffled(7, 0)) == list(range(7))
    assert EpochOrder(20, 6, 2, 5).indices(5) == EpochOrder(20, 6, 2, 5).indices(5)
