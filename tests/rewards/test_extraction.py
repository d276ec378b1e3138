"""Spellings of answers and how each is read, strictly (after a marker) and flexibly (else the last number)."""

from __future__ import annotations

from fractions import Fraction

import pytest

from posttrain.rewards.extraction import equal, extracted, flexible, gold_value, number_value, strict
from posttrain.rewards.functions import answer

MARKED = [
    (r"\boxed{42}", 42), (r"So \boxed{\frac{1}{2}}", Fraction(1, 2)), (r"$\boxed{1{,}200}$", 1200), (r"\fbox{7}", 7),
    ("#### 42", 42), ("so #### $18.", 18), ("7+8=15;#74", 74), ("#7;\n#8", 8), ("#### 40\n\nmore", 40), ("#### -3", -3),
    ("Answer: 42", 42), ("Answer: 42 dollars", 42), ("answer = 42", 42), ("The answer is 42.", 42), ("the final answer is: 42", 42),
    ("**Answer:** 42", 42), ("**Answer: 42**", 42), ("## Answer\n7", 7), ("### Final Answer\n\n**7**", 7), ("Answer:\n\n7", 7),
    ("The answer is $1,200.50", Fraction(2401, 2)), ("The answer is 20 + 22 = 42", 42), ("The answer is 42 (of 50)", 42),
    ("\u7b54\u6848\u662f42", 42), ("\u7b54\u6848\uff1a42\u3002", 42), ("Die Antwort ist 42", 42), ("La respuesta es 42", 42),
    ("La r\u00e9ponse est 42", 42), ("\u041e\u0442\u0432\u0435\u0442: 42", 42), ("Answer: \u22125", -5), ("Answer: -$5", -5),
    ("The answer is 3 1/2", Fraction(7, 2)), ("The answer is 3 x 10^2", 300), (r"Answer: 3 \times 10^{2}", 300), ("Answer: 2e3", 2000),
    ("Answer: 50%", 50), (r"Answer: 50\%", 50), ("Answer: 1/3", Fraction(1, 3)), ("The answer is 1. No, the answer is 2.", 2),
    ("I am #1! The answer is 42", 42), (r"The answer is \(42\)", 42), ("The answer is \"42\"", 42), ("The answer is: $42$", 42),
]  # fmt: skip
UNMARKED = [
    ("**42**", 42), ("$42$", 42), ("so he has 42 apples", 42), ("42\u3002", 42), ("42", 42), ("it is -3", -3), ("She makes 18.", 18),
    ("1 + 1 = 2", 2), ("10 - 5 = 5", 5), ("x=-5", -5), ("costs $1,200.00 in all", 1200), ("1\u202f200 km", 1200), ("= .5", Fraction(1, 2)),
    ("about 3 x 10^2 m", 300), ("3 1/2 cups", Fraction(7, 2)), (r"\frac{3}{4} of it", Fraction(3, 4)), ("\\dfrac{3}{4}", Fraction(3, 4)),
    ("2/3", Fraction(2, 3)), ("first 7, then 8", 8), ("(42)", 42), ("`42`", 42), ("*42*!", 42), ("I am #1 of 42 people", 42),
    ("He is 42, she 43", 43), ("5;#", 5), ("#74+5", 5), ("\u20ac5", 5), ("50 %", 50),
]  # fmt: skip
NOTHING = [
    "",
    "none",
    "no number",
    "v1.2.3",
    "12ab",
    "Answer: unknown",
    "#",
    "\\boxed{}",
    "the answer is x",
    "1.2.3",
    "B2B",
]
CHOICES = [
    ("the answer is (B)", "B"), ("Answer: B", "B"), ("B", "B"), ("(C)", "C"), ("B. Paris", "B"), (r"\boxed{D}", "D"),
    ("The correct answer is **A**", "A"), ("Answer: option C", "C"), ("\u7b54\u6848\u662fB", "B"), ("A) is wrong, so the answer is B", "B"),
]  # fmt: skip


def test_the_table_has_at_least_eighty_spellings() -> None:
    assert len(MARKED) + len(UNMARKED) + len(NOTHING) + len(CHOICES) >= 80


@pytest.mark.parametrize(("text", "value"), MARKED)
def test_an_answer_after_a_marker(text: str, value: int | Fraction) -> None:
    for found in (strict(text), flexible(text)):
        assert number_value(found or "") == value


@pytest.mark.parametrize(("text", "value"), UNMARKED)
def test_an_answer_without_a_marker_is_the_last_number(text: str, value: int | Fraction) -> None:
    assert strict(text) is None
    assert number_value(flexible(text) or "") == value


@pytest.mark.parametrize("text", NOTHING)
def test_no_answer_is_none(text: str) -> None:
    assert strict(text) is None
    assert flexible(text) is None


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_a_letter_of_multiple_choice(text: str, letter: str) -> None:
    assert extracted(text, "strict", "choice") == letter
    assert equal(letter, f"({letter})", "choice")


def test_values_that_used_to_pass_wrongly() -> None:
    assert not equal(flexible("3 1/2") or "", "0.5")
    assert not equal(flexible("3 x 10^2") or "", "2")
    assert gold_value("so 3 + 4 = 7\n#### 7") == 7
    assert equal("7", '["seven", "7"]')
    assert not equal("x", "x")


def test_the_reward_chooses_its_extractor_and_kind() -> None:
    texts = ["he has 42 apples", "Answer: 42", "none"]
    assert answer([], texts, answer=["42"] * 3) == [1.0, 1.0, 0.0]
    assert answer([], texts, answer=["42"] * 3, extract="strict") == [0.0, 1.0, 0.0]
    assert answer([], ["the answer is (B)"], answer=["B"], kind="choice") == [1.0]
    assert answer([], ["Answer: madrid"], answer=['["Madrid", "Madrid city"]'], kind="text") == [1.0]
