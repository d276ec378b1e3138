"""The two environments with turns: the results of their tools, their ends, and that their demonstrations play by the rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environments import calculator, guess
from posttrain.environments.base import Conversation, environment
from posttrain.environments.parts import KINDS


def replayed(name: str, row: dict[str, Any], turns: Sequence[dict[str, Any]], answer: str) -> float | None:
    """Play a demonstration against the environment; return the reward of its last turn."""
    found = environment(name)
    assert found.step is not None
    messages = list(row["prompt"])
    for number in range(0, len(turns), 2):
        messages.append(turns[number])
        reply = found.step(Conversation(tuple(messages), {"answer": answer}, number // 2 + 1))
        assert (reply or []) == list(turns[number + 1 : number + 2])
        messages += reply or []
    return found.judge(turns[-1]["content"], answer)


def test_demonstrations_of_the_calculator_get_what_the_tool_says() -> None:
    for row in calculator.rows("sft", 60, 0):
        assert replayed("calculator", row, row["completion"], row["completion"][-1]["content"]) == 1.0
    for row in calculator.rows("preferences", 60, 0):
        gold = row["chosen"][-1]["content"]
        assert replayed("calculator", row, row["chosen"], gold) == 1.0
        assert replayed("calculator", row, row["rejected"], gold) == 0.0


def test_demonstrations_of_the_guesses_find_the_number_within_five() -> None:
    for row in guess.rows("sft", 60, 0):
        turns = row["completion"]
        assert len(turns) // 2 + 1 <= 5
        assert replayed("guess", row, turns, turns[-1]["content"]) == 1.0


def test_rejected_guesses_are_answered_truly_and_give_up() -> None:
    for row in guess.rows("preferences", 60, 0):
        hidden = row["chosen"][-1]["content"]
        messages = (*row["prompt"], row["rejected"][0])
        assert guess.step(Conversation(messages, {"answer": hidden}, 1)) == [row["rejected"][1]]
        assert guess.judge(row["rejected"][-1]["content"], hidden) == 0.0


@given(st.text())
def test_no_turn_breaks_an_environment(said: str) -> None:
    asked = Conversation(({"role": "user", "content": "?"}, {"role": "assistant", "content": said}), {"answer": "7"}, 1)
    calculator.step(asked)
    guess.step(asked)


@pytest.mark.parametrize("name", ["calculator", "guess"])
def test_tables_share_no_question(name: str) -> None:
    found = environment(name)
    questions = [{row["prompt"][-1]["content"] for row in found.rows(kind, 60, 0)} for kind in KINDS]
    assert len(set().union(*questions)) == 4 * 60
