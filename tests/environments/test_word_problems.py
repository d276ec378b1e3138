"""Generated word problems, their workings and the judge of last numbers."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environments.expressions import expression_value
from posttrain.environments.parts import KINDS
from posttrain.environments.word_problems import Problem, judge, rows
from posttrain.errors import ConfigError


def value_of(working: str) -> int:
    """Return the number after the equals sign, once it has been computed from the text before it."""
    computed, said = working.split(" = ")
    assert expression_value(computed) == int(said)
    return int(said)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("12 + 7 = 19", "19", 1.0), ("19", "19", 1.0), ("Tom has 19 apples.", "19", 1.0), ("19 apples, not 20", "19", 0.0),
        ("= -4", "4", 0.0), ("12-7=5", "5", 1.0), ("1,200", "1200", 1.0), ("19.0", "19", 1.0), ("A19", "19", 0.0),
        ("", "19", 0.0), ("none", "19", 0.0), ("12 + 7 =", "19", 0.0),
    ],
)  # fmt: skip
def test_the_last_number_is_the_answer(completion: str, answer: str, reward: float) -> None:
    assert judge(completion, answer) == reward


@given(st.text(), st.text())
def test_no_text_breaks_the_judge(completion: str, answer: str) -> None:
    judge(completion, answer)


def test_workings_name_every_number_of_the_question_and_compute_to_the_answer() -> None:
    for row in rows("sft", 300, 0):
        computed = row["completion"].partition(" = ")[0]
        assert sorted(re.findall(r"\d+", computed)) == sorted(re.findall(r"\d+", row["prompt"]))
        assert value_of(row["completion"]) >= 1


def test_workings_go_from_left_to_right() -> None:
    assert Problem("", 3, (("*", 5), ("-", 2))).working() == "3 * 5 - 2 = 13"


def test_careless_workings_compute_to_another_answer() -> None:
    right = {row["prompt"]: value_of(row["chosen"]) for row in rows("preferences", 300, 0)}
    wrong = {row["prompt"]: value_of(row["rejected"]) for row in rows("preferences", 300, 0)}
    assert all(right[prompt] != wrong[prompt] for prompt in right)
    every = Problem("", 2, (("*", 2), ("+", 5)))
    assert all(every.careless(random.Random(i)).answer != every.answer for i in range(20))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_careless_demonstrations(share: float) -> None:
    answers = {row["prompt"]: row["completion"] for row in rows("sft", 50, 0)}
    shown = {row["prompt"]: row["completion"] for row in rows("sft", 50, 0, careless=share)}
    same = [shown[prompt] == answers[prompt] for prompt in shown if prompt in answers]
    assert same
    assert not any(same) if share else all(same)


@pytest.mark.parametrize(("share", "signs"), [(0.0, {1}), (1.0, {2})])
def test_the_share_of_problems_with_two_steps(share: float, signs: set[int]) -> None:
    assert {len(re.findall(r" [-+*] ", row["completion"])) for row in rows("sft", 50, 0, two_steps=share)} == signs


def test_tables_share_no_question() -> None:
    prompts = {kind: {row["prompt"] for seed in range(3) for row in rows(kind, 60, seed)} for kind in KINDS}
    for one, other in itertools.combinations(KINDS, 2):
        assert not prompts[one] & prompts[other]


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.evaluation\.rows = 3000: only .*largest = 3\b"):
        rows("evaluation", 3000, 0, largest=3, two_steps=0.0)
