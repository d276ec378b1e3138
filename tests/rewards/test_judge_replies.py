"""A judge's short reply gives one grade, yes or no, or verdict; one with two of them gives none."""

from __future__ import annotations

import pytest

from posttrain.judges.marks import marked_grade, marked_verdict
from posttrain.rewards.judge_replies import agreed, grade, verdict


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("7", 7), ("7/10", 7), ("**8**", 8), ("8 out of 10", 8), ("[[7]]", 7), ("8 points", 8), ("10/10", 10), ("8.", 8),
        ("On a scale of 1 to 10, I give 7", 7), ("1-10: 8", 8), ("Score: 8\n\nThe answer has 2 errors", 8), ("8\n\nReason: 2 errors", 8),
        ("<think>9</think>4", 4), ("Rating: 8/10, as 9/10 would need", 8),
        ("Not a 10, but 8", None), ("2 errors, so 6", None), ("7.5", None), ("-5", None), ("11", None), ("0", None), ("7-8", None),
        ("Grade: 7 or 8", None), ("<think>It might be 9", None), ("good", None), ("", None),
    ],
)  # fmt: skip
def test_a_grade_is_the_one_number_that_is_given(reply: str, found: int | None) -> None:
    assert grade(reply, 10) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("yes", 1.0), ("**Yes**", 1.0), ("Yes, there is no error.", 1.0), ("There is no error, so yes", 1.0), ("No doubt, yes", 1.0),
        ("no", 0.0), ("Answer: no", 0.0), ("No. It is rude.", 0.0),
        ("There is no error.", None), ("yes and no", None), ("Yes or no?", None), ("Not true", None), ("<think>yes", None), ("maybe", None),
    ],
)  # fmt: skip
def test_yes_or_no_is_the_first_or_the_last_word(reply: str, found: float | None) -> None:
    assert agreed(reply) == found


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("A", 1.0), ("Answer A", 1.0), ("A is better than B", 1.0), ("A, because B is wrong", 1.0), ("I'd say A.", 1.0),
        ("**B**", 0.0), ("B beats A", 0.0), ("The better answer is B.", 0.0), ("B\n\nReason: A is too short", 0.0),
        ("tie", 0.5), ("It's a tie", 0.5), ("Both are equally good", 0.5),
        ("A is worse", None), ("B is worse than A", None), ("Neither A nor B is better", None), ("Not A", None), ("A or B", None),
        ("A and B are equal", None), ("A. Wait, no, B", None), ("A is not as good as B", None), ("A good question", None),
        ("<think>A", None),
    ],
)  # fmt: skip
def test_a_verdict_is_the_one_answer_that_is_preferred(reply: str, found: float | None) -> None:
    assert {"A": 1.0, "tie": 0.5, "B": 0.0, None: None}[verdict(reply)] == found


def test_brackets_count_before_words_if_their_line_has_one_and_the_reasoning_has_ended() -> None:
    replies = (
        "[[A]]\nso [[B]]", "[[A]] or [[B]]", "<think>[[B]]</think>[[A]]", "[[B]] ... no: [[C]]", "B is longer, but [[A]]",
        "If the answer is right, so [[A]]",
    )  # fmt: skip
    for read in (verdict, marked_verdict):
        assert [read(reply) for reply in replies] == ["B", None, "A", "tie", "A", "A"]
    scores = [
        (grade(reply, 10), marked_grade(reply, 1, 10))
        for reply in (
            "[[7]] out of [[10]]",
            "No errors: [[7]] out of [[10]]",
            "[[3]], no, [[5]]",
            "<think>[[9]]</think>[[4]]",
            "[[99]]",
            "2 errors, so [[7.5]]",
        )
    ]
    assert scores == [(each, each) for each in (None, None, 5.0, 4.0, None, 7.5)]


def test_a_question_that_asked_for_brackets_has_no_answer_without_them() -> None:
    """A reply that was cut off has named one answer only."""
    assert marked_verdict("Answer A explains the steps.") is None
    assert (verdict("A!"), marked_verdict("A!"), verdict("<think>[[A]]")) == ("A", None, None)
    assert (grade("8", 10), marked_grade("8", 1, 10)) == (8.0, None)
