"""Attention for only the positions that are read equals the attention of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.batches import TokenBatch, collate
from posttrain.data.layout import Attended, Reads
from posttrain.data.tokens import Tokens

a_prompt = st.sampled_from([(3,), (4, 5), (5, 6, 7, 8), (6,) * 9, (7,) * 30])
batches = st.lists(st.builds(Tokens, a_prompt, st.lists(st.just(9), max_size=14).map(tuple)), min_size=1, max_size=9)


def seen(parts: tuple[Attended, ...]) -> dict[int, list[int]]:
    """Return the tokens that each attending token sees, itself included. No token is seen twice."""
    found: dict[int, list[int]] = {}
    for part in parts:
        real = set(part.real.tolist())
        assert part.tokens.tolist() == part.queries.flatten()[part.real].tolist()
        for row, (queries, keys) in enumerate(zip(part.queries.tolist(), part.keys.tolist(), strict=True)):
            for i, query in enumerate(queries):
                if row * len(queries) + i in real:
                    assert query not in found
                    visible = range(i + 1) if part.mask is None else part.mask[row, 0, i].nonzero()[:, 0].tolist()
                    found[query] = sorted(keys[k] for k in visible)
    return found


def test_what_predicts_by_hand() -> None:
    prompt = (5, 6, 7, 8)
    batch = collate([Tokens(prompt, (9, 2)), Tokens((4, 4, 4), (2,)), Tokens(prompt, (3, 3, 3)), Tokens((5,), ())])
    # 0 to 3 the prompt, 4 and 5, 6 to 8 its responses; 9 to 11 and 12; 13
    assert batch.predicting().tokens.tolist() == [3, 4, 6, 7, 11]
    found = seen(batch.predicting().parts)
    assert found[3] == [0, 1, 2, 3]
    assert found[4] == [0, 1, 2, 3, 4]
    assert found[7] == [0, 1, 2, 3, 6, 7]
    assert found[11] == [9, 10, 11]
    assert 0 not in found, "most of a prompt is only seen"


def test_what_ends_by_hand() -> None:
    prompt = (5, 6, 7, 8)
    batch = collate([Tokens(prompt, (9, 2)), Tokens((4, 4), (2, 2)), Tokens(prompt, ()), Tokens(prompt, ())])
    assert batch.ending().tokens.tolist() == [3, 5, 9]
    assert seen(batch.ending().parts) == {3: [0, 1, 2, 3], 5: [0, 1, 2, 3, 4, 5], 9: [6, 7, 8, 9]}


@pytest.mark.parametrize(
    ("read", "places"),
    [
        (TokenBatch.predicting, lambda batch: set(batch.source[batch.mask].tolist())),
        (TokenBatch.ending, lambda batch: set(batch.last.tolist())),
    ],
)
@given(batches)
def test_all_that_is_read_sees_what_it_sees_in_the_whole(
    read: Callable[[TokenBatch], Reads], places: Callable[[TokenBatch], set[int]], rows: list[Tokens]
) -> None:
    batch = collate(rows)
    whole, reads = seen(batch.parts), read(batch)
    assert sorted(whole) == list(range(len(batch.input_ids)))
    assert set(reads.tokens.tolist()) == places(batch)
    assert reads.tokens.tolist() == sorted(set(reads.tokens.tolist()))
    found = seen(reads.parts)
    assert set(reads.tokens.tolist()) <= set(found)
    assert all(whole[token] == keys for token, keys in found.items())
