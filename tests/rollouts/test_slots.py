"""The slots in which answers keep their keys and values."""

from __future__ import annotations

import pytest
import torch

from posttrain.rollouts.slots import DENSE_BYTES, Slots, StateKind

KIND = StateKind(heads=1, sizes=(2, 2), dtype=torch.float32)


def _filled(capacity: int, tokens: int, fixed: bool = False) -> Slots:
    """Return slots of two answers to one prompt, whose token number i has keys of i and values of -i."""
    slots = Slots(layers=1, capacity=capacity, device=torch.device("cpu"), shared=True, fixed=fixed, kinds=[KIND])
    prompt = torch.zeros(1, 1, 3, 2)
    with slots.entering(lengths=[3], counts=[2]):
        slots.layers[0].write(0, (prompt, prompt))
    for i in range(1, tokens + 1):
        slots.settle()
        slots.prepare()
        state = torch.full((2, 1, 1, 2), float(i))
        slots.layers[0].update(state, -state)
        slots.grow()
        slots.count_token()
    return slots


@pytest.mark.parametrize(
    ("tokens", "columns"), [(1, 4), (4, 4), (5, 8), (33, 36), (64, 64), (65, 72), (97, 108), (128, 132), (133, 200)]
)
def test_answers_have_little_room_beyond_their_tokens_until_they_are_long(tokens: int, columns: int) -> None:
    slots = _filled(200, tokens)
    keys, values = slots.layers[0].answers
    assert keys.shape == values.shape == (2, 1, columns, 2)
    numbers = torch.arange(1.0, tokens + 1)
    assert torch.equal(keys[1, 0, :tokens, 0], numbers)
    assert torch.equal(values[0, 0, :tokens, 1], -numbers)


def test_room_never_exceeds_the_capacity_and_is_whole_at_once_in_a_fixed_layout() -> None:
    assert _filled(6, 5).layers[0].answers[0].shape[2] == 6
    assert _filled(6, 1, fixed=True).layers[0].answers[0].shape[2] == 6


def test_large_states_have_their_whole_room_at_once() -> None:
    # two answers, 16 bytes of a token's key and value
    assert _filled(DENSE_BYTES // 32, 1).layers[0].answers[0].shape[2] == 4
    assert _filled(DENSE_BYTES // 32 + 1, 1).layers[0].answers[0].shape[2] == DENSE_BYTES // 32 + 1


def test_answers_that_stay_lose_the_room_of_those_that_leave() -> None:
    slots = _filled(40, 5)
    prompt = torch.ones(1, 1, 3, 2)
    with slots.entering(lengths=[3], counts=[1]):
        slots.layers[0].write(0, (prompt, prompt))
    assert slots.layers[0].answers[0].shape == (3, 1, 8, 2)
    slots.keep([2])
    assert slots.layers[0].answers[0].shape == (1, 1, 4, 2)
