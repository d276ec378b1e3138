"""Verdicts of the reward `answer` on what models write: neither a wrong answer passes, nor does a right one fail."""

from __future__ import annotations

from itertools import product

import pytest

from posttrain.data.limits import bounded
from posttrain.rewards.extraction import flexible
from posttrain.rewards.functions import answer
from posttrain.rewards.number_words import spelt_number
from posttrain.rewards.values import number_value

RIGHT = [
    ("15 = 7 + 8", "15"), ("7 is wrong; it is 8", "8"), ("7 of them, and 1 more, is 8", "8"), ("\\boxed{7\\ 000}", "7000"),
    ("1. 2 + 3 = 5\n2. 5 + 1 = 6", "6"), ("5. I counted them.", "5"), ("It is 5.\nStep 2: check", "5"), ("\\boxed{7\\text{ apples}}", "7"),
    ("five", "5"), ("Five apples", "5"), ("The answer is five.", "5"), ("**twenty-one**", "21"), ("one hundred and five", "105"),
    ("twelve hundred", "1200"), ("two hundred thousand and six", "200006"), ("zero", "0"), ("a dozen", "12"), ("half", "0.5"),
    ("three quarters", "3/4"), ("negative five", "-5"), ("\u7b54\u6848\u662f\u4e00\u767e\u96f6\u4e94", "105"), ("\u5341\u4e8c\u4e2a", "12"),
    ("minus 5", "-5"), ("The answer is negative $5", "-5"), ("\uff0d5", "-5"), ("10 minus 5 is 5", "5"), ("10 - 5 = $5", "5"),
    ("1 000", "1000"), ("1'000", "1000"), ("1_000", "1000"), ("1,00,000", "100000"), ("12,34,567", "1234567"), ("$5k", "5000"),
    ("90^\\circ", "90"), ("\\boxed{90^{\\circ}}", "90"), ("-5\u00b0C", "-5"), ("5kWh", "5"), ("5 m\u00b2", "5"), ("2**10", "1024"),
    ("The answer is 5. Wait, no, 6.", "6"), ("Answer: 5? No, 6", "6"), ("The answer is 5. Wait: 2 + 3 = 5. Yes.", "5"),
    ("It can't be 5; it is 6", "6"), ("The answer is 5 rather than 6", "5"), ("~~6~~ 5", "5"), ("<b>5</b>", "5"), ("2+3 => 5", "5"),
    ("> 5", "5"), ("5, because 5 > 3 and so it is 5", "5"), ("at least 5", "5"), ("5 and then 6", "6"),
    ("The answer is 5 hours 30 minutes = 330 minutes", "330"),
    ("<think>the answer is 6</think>5", "5"), ("<think>\\boxed{6}</think>So he has 5.", "5"), ("maybe 6\n</think>\n\nAnswer: 5", "5"),
    ("<|channel|>analysis<|message|>6?<|end|><|start|>assistant<|channel|>final<|message|>5", "5"),
    ("[THINK]6[/THINK]5", "5"), ("The answer is 5\n\nQuestion: What is 3+3?\nAnswer: 6", "5"), ("Question: 2+3?\nAnswer: 5", "5"),
]  # fmt: skip
WRONG = [
    ("7 is not the answer", "7"), ("7 is wrong", "7"), ("7 times 8", "8"), ("7 out of 8", "8"), ("7 divided by 8", "8"), ("7 + 8 =", "8"),
    ("$5$ dollars and $30$ cents", "5"), ("$5 and 30 cents", "30"), ("\\boxed{7\\text{ or }8}", "7"), ("1. first\n2. second", "2"),
    ("Step 1: a\nStep 2: b", "2"),
    ("It can't be 5.", "5"), ("The answer is no longer 5", "5"), ("The answer is anything but 5", "5"), ("It cannot be 5", "5"),
    ("The answer is 5. Wait, no, 6.", "5"), ("~~5~~", "5"), ("minus 5", "5"), ("one of them", "1"), ("two three", "5"),
    ("x \u2264 5", "5"), ("x < 5", "5"), ("x >= 5", "5"), ("The answer is > 5", "5"), ("x != 5", "5"), ("x \\neq 5", "5"), ("5 < x", "5"),
    ("\u00b15", "5"), ("x = \\pm 5", "5"), ("5 \u00b1 1", "5"), ("+/- 5", "5"),
    ("15 - 10", "10"), ("15-10", "10"), ("15 -10", "-10"), ("15 * 10", "10"), ("y = 5x + 3", "3"), ("The answer is 2x+5", "5"),
    ("3+5i", "3"),
    ("5\u03c0", "5"), ("2\\sqrt{3}", "2"), ("12:30", "30"), ("2024-05-06", "6"), ("05/06/2024", "2024"), ("3:4", "4"),
    ("5-6", "6"), ("#74+5", "5"),
    ("5 hours 30 minutes", "30"), ("The answer is 5 feet 3 inches", "5"), ("5'3\"", "3"), ("3 remainder 1", "1"),
    ("The answer is 3 R 1", "3"),
    ("The answer is 5, 6", "5"), ("The answer is 5 and 6", "5"), ("\\boxed{5, 6}", "5"), ("\\boxed{5} or \\boxed{6}", "6"),
    ("the roots are 5 and 6", "6"),
    ("2,5 cm", "5"), ("The answer is 1,5", "15"), ("The answer is 1,5", "1"), ("1 000", "0"), ("90^\\circ", "0"),
    ("<think>the answer is 5", "5"), ("<think>the answer is 5</think>", "5"), ("The answer is 5\n\nQuestion: 3+3?\nAnswer: 6", "6"),
    ("<|channel|>analysis<|message|>the answer is 5", "5"),
]  # fmt: skip
LETTERS = [
    ("The answer is not B but C", "C"), ("B is incorrect, C is right", "C"), ("(A) is wrong. (B) is right.", "B"),
    ("The correct option is B because A is wrong", "B"), ("The answer is B. Wait, no, C.", "C"), ("<think>maybe (C)</think>B", "B"),
    ("\uff22", "B"), ("B, not A", "B"), ("Both A and B are wrong, so C", "C"), ("A. cats\nB. dogs\nAnswer: B", "B"),
]  # fmt: skip
NO_LETTER = [
    "It is not B",
    "It isn't (B)",
    "B is wrong",
    "A or B",
    "both A and B",
    "A/B",
    "Neither A nor B",
    "The answer is A, B",
    "<think>B",
    "\\boxed{A} or \\boxed{B}",
]


def _verdict(text: str, gold: str, **options: object) -> float | None:
    return answer([""], [text], answer=[gold], **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "gold"), RIGHT)
def test_a_right_answer_passes(text: str, gold: str) -> None:
    assert _verdict(text, gold) == 1.0


@pytest.mark.parametrize(("text", "gold"), WRONG)
def test_a_wrong_or_unclear_answer_fails(text: str, gold: str) -> None:
    assert _verdict(text, gold) == 0.0


@pytest.mark.parametrize(("text", "gold"), LETTERS)
def test_the_chosen_letter(text: str, gold: str) -> None:
    assert _verdict(text, gold, kind="choice") == 1.0


@pytest.mark.parametrize("text", NO_LETTER)
def test_a_denied_letter_or_several_are_no_choice(text: str) -> None:
    assert [_verdict(text, gold, kind="choice") for gold in "ABC"] == [0.0, 0.0, 0.0]


def test_a_text_answer_follows_the_reasoning() -> None:
    assert _verdict("<think>London</think>Paris!", "Paris", kind="text") == 1.0
    assert _verdict("<think>Paris</think>London", "Paris", kind="text") == 0.0


def test_what_was_taken_back_is_no_strict_answer() -> None:
    assert _verdict("The answer is 5. Wait, no, 6.", "5", extract="strict") == 0.0
    assert _verdict("The answer is five.", "5", extract="strict") == 1.0


@pytest.mark.parametrize(
    "part", ["\nQ: ", "\nanswer is 1\nQ:", "<think>", "</think>", "1,", "not B ", "A or ", "twenty ", "wait 1 ", "< 5 "]
)
def test_a_repeated_part_is_judged_within_bounds(part: str) -> None:
    with bounded(seconds=10):
        for kind in ("number", "choice", "text"):
            assert _verdict(part * (20_000 // len(part)), "5", kind=kind) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("words", "digits"),
    [("nineteen hundred", "1900"), ("three million two hundred thousand and one", "3200001"), ("forty two", "42"), ("a third", "1/3"),
     ("two forty", None), ("five five", None), ("twenty thirty", None), ("and", None), ("", None), ("of", None)],
)  # fmt: skip
def test_numbers_in_words(words: str, digits: str | None) -> None:
    assert spelt_number(words) == digits


def test_an_answer_among_other_numbers_is_read_as_itself() -> None:
    """4,000 texts of a lead, a marker, a number and an end."""
    leads = [
        "",
        "Let's see: 3+4=7. ",
        "1. add 2\n2. add 3\n",
        "<think>maybe 99</think>",
        "Between 3 and 5 there is 4. ",
        "It costs $5, not $6. ",
    ]
    markers = [
        "The answer is ",
        "Answer: ",
        "#### ",
        "Final answer:\n",
        "<answer>",
        "therefore it is ",
        "Thus x = ",
        "= ",
    ]
    forms = ["{n}", "{n:,}", "${n}$", "**{n}**", "\\boxed{{{n}}}", "{n}.0", "{n}%", "{n} apples", "({n})", "{n}."]
    for lead, marker, form, end, n in product(leads, markers, forms, ["", "\n"], [0, 7, 42, 1000, 123456]):
        text = lead + marker + form.format(n=n) + end
        assert number_value(flexible(text) or "") == n, text
