"""Spellings of answers and how each is read, strictly (after a marker) and flexibly (else the last number)."""

from __future__ import annotations

from fractions import Fraction

import pytest

from posttrain.data.limits import bounded
from posttrain.rewards.extraction import equal, extracted, flexible, gold_value, strict
from posttrain.rewards.functions import answer
from posttrain.rewards.values import number_value

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
    (r"\boxed{3\frac{1}{2}}", Fraction(7, 2)), (r"\boxed{\frac12}", Fraction(1, 2)), (r"\boxed{-\frac{3}{4}}", Fraction(-3, 4)),
    (r"\boxed{\frac{-1}{2}}", Fraction(-1, 2)), (r"\boxed{10^2}", 100), (r"\boxed{2^{10}}", 1024),
    ("the answer is 10^-2", Fraction(1, 100)),
    (r"\boxed{42\text{ cm}}", 42), ("the answer is 42cm", 42), ("Answer: 42 = 6*7", 42), ("The answer is - 42", -42),
    ("Answer: \u20135", -5),
    ("<answer>42</answer>", 42), ("<think>7?</think><answer>\n42\n</answer> 1", 42), ("[ANSWER] 42 [/ANSWER]", 42), ("#### \u221242", -42),
    ("the answer is 1 000 000", 1_000_000), ("The answer is __42__", 42), ("The answer is:\n\n\\[\n42\n\\]", 42),
    ("Answer:\n$$\n42\n$$", 42),
    ("the answer is \u00bd", Fraction(1, 2)), ("the answer is 3\u00bd", Fraction(7, 2)), ("\u7b54\u6848\uff1a\uff14\uff12", 42),
    ("\u0627\u0644\u062c\u0648\u0627\u0628: \u0664\u0662", 42), ("\uc815\ub2f5: 42", 42), ("\u0909\u0924\u094d\u0924\u0930: 42", 42),
    ("answer is 3\u00d710\u2075", 300_000), ("Odpov\u011b\u010f: 42", 42), ("Answer: 42 * (sure)", 42), ("The answer is 42: 6 times 7", 42),
    ("I am #1! The answer is 42", 42), (r"The answer is \(42\)", 42), ("The answer is \"42\"", 42), ("The answer is: $42$", 42),
    ("The answer is 1.5 million", 1_500_000), ("Answer: $1.5 million.", 1_500_000), ("Answer: 5 hundred thousand", 500_000),
    ("Answer: 1 million 200 thousand", 1_200_000),
    ("Answer: 1 million and 200 thousand", 1_200_000), ("Answer: -1 million 200 thousand", -1_200_000), ("Answer: 2 dozen eggs", 24),
    ("\u7b54\u6848\u662f150\u4e07", 1_500_000), ("\u7b54\u6848\uff1a3\u4e075\u5343", 35_000),
    ("\u7b54\u6848\uff1a1\u4ebf2000\u4e07", 120_000_000),
    ("\u7b54\u6848\u662f5\u5343\u514b", 5), ("Antwort ist 42 Millionen", 42_000_000),
    ("\u041e\u0442\u0432\u0435\u0442: 5 \u0442\u044b\u0441\u044f\u0447", 5000),
    ("Answer: 3 x 10^2 million", 300_000_000), ("Answer: 1 hundred percent", 100), ("Answer: 5 millennia", 5),
    ("The answer is not 42, but 43", 43), ("The answer is 43, not 42", 43), ("The answer is not 3 or 4 but 5", 5),
    ("Answer: **not 42** but 43", 43),
    ("The answer is 1/2 or 0.5", Fraction(1, 2)), ("The answer is 42 or so", 42),
    ("The answer is 3.14 to 2 decimal places", Fraction(157, 50)), ("The answer is 42 to the nearest 10", 42),
]  # fmt: skip
UNMARKED = [
    ("**42**", 42), ("$42$", 42), ("so he has 42 apples", 42), ("42\u3002", 42), ("42", 42), ("it is -3", -3), ("She makes 18.", 18),
    ("1 + 1 = 2", 2), ("10 - 5 = 5", 5), ("x=-5", -5), ("costs $1,200.00 in all", 1200), ("1\u202f200 km", 1200), ("= .5", Fraction(1, 2)),
    ("about 3 x 10^2 m", 300), ("3 1/2 cups", Fraction(7, 2)), (r"\frac{3}{4} of it", Fraction(3, 4)), ("\\dfrac{3}{4}", Fraction(3, 4)),
    ("2/3", Fraction(2, 3)), ("first 7, then 8", 8), ("(42)", 42), ("`42`", 42), ("*42*!", 42), ("I am #1 of 42 people", 42),
    ("it covers 25 cm^2", 25), ("25 cm\u00b2", 25), ("2^10", 1024), ("10^3 of them", 1000), (r"\frac{-1}{2}", Fraction(-1, 2)),
    ("3\u00bd cups", Fraction(7, 2)), ("\uff11\uff12", 12), ("7 and then \\sqrt{2}", 7), ("He is 42, she 43", 43),
    ("5;#", 5), ("\u20ac5", 5), ("50 %", 50),
    ("he earns 1.5 million", 1_500_000), ("not 42, but 43", 43), ("It is 43, not 42.", 43), ("he has not 42 apples, but 43", 43),
    ("nicht 42, sondern 43", 43), ("\u4e0d\u662f42\uff0c\u800c\u662f43", 43), ("It isn't 42, it's 43", 43),
    ("between 3 and 5 hours, so 15", 15),
    ("Is it 3 or 4? It is 4.", 4), ("it rose from 3 to 5", 5), ("50\u767e\u5206\u70b9", 50), ("it is .5^2", Fraction(1, 4)),
    ("5million", 5_000_000), ("The answer is not more than 5", 5),
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
    "Answer: 6*7",
    "Answer: 12-15",
    "Answer: 2024-01-05",
    "the answer is 3:30",
    r"\boxed{\sqrt{4}}",
    r"\boxed{2\sqrt{3}}",
    r"Answer: \sqrt[3]{8}",
    r"\boxed{2\pi}",
    "the answer is 2\u03c0",
    "\\boxed{(-2)^{2}}",
    "The answer is between 3 and 5",
    "between 3 km and 5 km",
    "Answer: 3 to 5",
    "Answer: 2 million to 3 million",
    "The answer is 3 or 4",
    "either 3 or 4 apples",
    "x = 3 or x = -3",
    "The answer is x = 3 or x = -3",
    "\u7b54\u6848\u662f3\u52305",
    "The answer is not 42.",
    "The answer is 5 mil",
]
CHOICES = [
    ("the answer is (B)", "B"), ("Answer: B", "B"), ("B", "B"), ("(C)", "C"), ("B. Paris", "B"), (r"\boxed{D}", "D"),
    ("the answer is (b).", "B"), ("Answer: b", "B"), ("b", "B"), ("Answer: B, not A", "B"), ("<answer>C</answer>", "C"),
    (r"\boxed{\text{B}}", "B"), ("D: because A is wrong", "D"), ("The answer is\n(A)", "A"), ("Answer: A is right", "A"),
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


@pytest.mark.parametrize(
    "text", ["", "I do not know", "Answer: A dog", "Answer: B or C", "Answer: A/B", "E=mc^2", "A plan, e.g. this"]
)
def test_no_letter_is_none(text: str) -> None:
    assert extracted(text, "flexible", "choice") is None


@pytest.mark.parametrize(
    "text", ["**Madrid**", r"\boxed{\text{Madrid}}", 'Answer: "madrid".', "<answer> Madrid </answer>", "Madrid"]
)
def test_a_text_is_compared_without_its_markup(text: str) -> None:
    assert equal(extracted(text, kind="text") or "", "Madrid", "text")
    assert not equal(extracted(text, kind="text") or "", "Madri", "text")


@pytest.mark.parametrize(
    "part",
    [
        "#",
        "# 1",
        "9",
        "9,",
        "1 000 ",
        "\\boxed{",
        "<answer>",
        "answer is ",
        "\\frac{1}{",
        "3 x 10^2 ",
        "1 1/",
        "=",
        "(A",
        "1 million ",
        "not 1 or ",
        "between 1 and ",
    ],
)
def test_a_degenerate_completion_is_read_within_bounds(part: str) -> None:
    text = part * (20_000 // len(part))
    with bounded(seconds=10):
        found = extracted(text, "flexible", "number")
    assert found is None or len(found) <= len(text)


def test_values_that_used_to_pass_wrongly() -> None:
    assert not equal(flexible("3 1/2") or "", "0.5")
    assert not equal(flexible("3 x 10^2") or "", "2")
    assert gold_value("so 3 + 4 = 7\n#### 7") == 7
    assert equal("7", '["seven", "7"]')
    assert not equal("x", "x")


def test_a_scale_word_counts_or_is_the_unit_of_the_question() -> None:
    """A question in millions has the gold answer 1.5; a percent sign is a unit only, so that 50 % is 50 and never 0.5."""
    assert equal("1.5 million", "1500000")
    assert equal("1,500,000", "1.5 million")
    assert equal("1.5 million", "1.5")
    assert not equal("1.5", "1.5 million")
    assert not equal("1.5 million", "15")
    assert not equal("50%", "0.5")


def test_the_reward_chooses_its_extractor_and_kind() -> None:
    texts = ["he has 42 apples", "Answer: 42", "none"]
    assert answer([], texts, answer=["42"] * 3) == [1.0, 1.0, 0.0]
    assert answer([], texts, answer=["42"] * 3, extract="strict") == [0.0, 1.0, 0.0]
    assert answer([], ["the answer is (B)"], answer=["B"], kind="choice") == [1.0]
    assert answer([], ["Answer: madrid"], answer=['["Madrid", "Madrid city"]'], kind="text") == [1.0]
