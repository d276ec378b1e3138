"""Generated story openings and the judge of mentions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environments.parts import KINDS
from posttrain.environments.stories import mentions, rows
from posttrain.errors import ConfigError

TASK: dict[str, Any] = {
    "words": ["dragon", "king", "day", "they", "friends", "house"],
    "openings": [f"Once there were {n} girls." for n in range(40)],
    "careless": 0.5,
}


@pytest.mark.parametrize(
    ("completion", "word", "found"),
    [
        ("The Dragon ran.", "dragon", True), ("dragons ran", "dragon", False), ("a snapdragon", "dragon", False),
        ("\"dragon!\"", "dragon", True), ("", "dragon", False), ("anything", "", False), ("dragon_1", "dragon", False),
        ("C++ is fun", "c++", True), ("an ice  cream", "ice cream", False), ("a.b", "a.b", True), ("axb", "a.b", False),
    ],
)  # fmt: skip
def test_a_mention_is_a_word_of_its_own_in_any_case(completion: str, word: str, found: bool) -> None:
    assert mentions(completion, word) is found


@given(st.text(), st.text())
def test_no_text_breaks_the_judge(completion: str, word: str) -> None:
    mentions(completion, word)


def test_the_prompt_asks_for_the_word_and_ends_in_the_opening() -> None:
    for row in rows("problems", 40, 0, **TASK):
        assert mentions(row["prompt"], row["answer"])
        assert row["prompt"].endswith("girls.")


def test_chosen_stories_mention_the_word_and_rejected_ones_do_not_even_by_accident() -> None:
    for row in rows("preferences", 30, 0, **TASK):
        word = next(w for w in TASK["words"] if f"about the {w}." in row["prompt"])
        assert mentions(row["chosen"], word)
        assert not mentions(row["rejected"], word)
        assert row["rejected"].strip()
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)


@pytest.mark.parametrize("careless", [0.0, 1.0])
def test_careless_stories_forget_the_word(careless: float) -> None:
    for row in rows("sft", 40, 0, **TASK | {"careless": careless}):
        word = next(w for w in TASK["words"] if f"about the {w}." in row["prompt"])
        assert mentions(row["completion"], word) is (careless == 0.0)


def test_tables_share_no_prompt() -> None:
    prompts = {kind: {row["prompt"] for seed in range(3) for row in rows(kind, 20, seed, **TASK)} for kind in KINDS}
    for one, other in itertools.combinations(KINDS, 2):
        assert not prompts[one] & prompts[other]


def test_too_few_words_say_how_many_combinations_there_are() -> None:
    with pytest.raises(ConfigError, match=r"data\.sft\.rows = 20: only \d .*data\.stories has 4 combinations"):
        rows("sft", 20, 0, words=["a", "b"], openings=["c", "d"], careless=0.5)
