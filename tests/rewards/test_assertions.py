"""Answers that a text denies, supposes, takes back, bounds or gives to someone else, and shapes that no single number has."""

from __future__ import annotations

import pytest

from posttrain.data.limits import bounded
from posttrain.rewards.functions import answer

NUMBER, CHOICE, TEXT = "number", "choice", "text"
DENIED = [
    *((text, "42", NUMBER) for text in (
        "The wrong answer is 42", "The incorrect answer is 42", "Wrong answer: 42", "A common wrong answer is 42. The right one is 43",
        "An incorrect final answer: 42", "The second-best answer is 42", "A tempting answer is 42", "Not the answer: 42",
    )),
    *((text, "B", CHOICE) for text in (
        "The wrong answer is B", "The incorrect answer is B", "Wrong answer: B", "Incorrect: B", "The incorrect option is B",
        "The second-best answer is B",
    )),
    *((text, "Paris", TEXT) for text in ("The wrong answer is Paris", "The incorrect answer is Paris", "Wrong answer: Paris")),
]  # fmt: skip
SOMEONE_ELSES = [
    ("A student said the answer is 42", "42", NUMBER), ("Someone might say the answer is 42, but it's 43", "42", NUMBER),
    ("One may think the answer is 42.", "42", NUMBER), ("His answer is 42", "42", NUMBER), ("The previous answer is 42", "42", NUMBER),
    ("Previously I said the answer is 42", "42", NUMBER), ("Bob wrote \\boxed{42}", "42", NUMBER),
    ("Twice the answer is 42", "42", NUMBER), ("A student said the answer is B", "B", CHOICE),
    ("One may think the answer is Paris", "Paris", TEXT), ("Bob said the answer is B", "B", CHOICE),
]  # fmt: skip
TAKEN_BACK = [
    *((text, "42", NUMBER) for text in (
        "\\boxed{42}. Sorry, I meant 43.", "The answer is 42. I mean 43.", "The answer is 42. Let me correct that: 43.",
        "<answer>42</answer> Correction: 43", "#### 42\nWait, it is 43.", "\\boxed{42}. No, it is 43.",
        "The answer is 42. On second thought, 43.",
    )),
    ("\\boxed{Paris}. Sorry, I meant Rome.", "Paris", TEXT), ("The answer is Paris. Wait, no, Rome.", "Paris", TEXT),
    ("The answer is B. I mean C.", "B", CHOICE), ("\\boxed{B}. Sorry, I meant C.", "B", CHOICE),
]  # fmt: skip
STRUCTURES = [
    ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "1"), ("\\boxed{\\begin{pmatrix}7 & 2\\end{pmatrix}}", "7"),
    ("\\boxed{\\left[\\begin{array}{c}1\\\\2\\end{array}\\right]}", "1"),
    ("\\boxed{\\begin{cases}1\\\\2\\end{cases}}", "1"),
    ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "2"), ("\\boxed{\\langle 1, 2\\rangle}", "1"),
    ("\\boxed{1 \\over 2}", "1"), ("\\boxed{{1 \\over 2}}", "1"), ("(1)/(2)", "1"), ("\\boxed{1:2}", "1"), ("1 : 2", "1"),
    ("The answer is 1 : 2", "1"), ("The answer is 1\u20442", "1"), ("The answer is 1\u2044\u2082", "1"), ("1\u2044x", "1"),
    ("0.(3)", "3"), ("The answer is 0.(3)", "0"), ("The answer is 0.3\u0305", "0.3"), ("The answer is 42\u2088", "42"),
    ("The answer is 42, 43, 44", "42"), ("The answer is 42+", "42"), ("42+ apples", "42"),
    ("The answer is 42 % 5", "42"), ("The answer is 42 div 5", "42"), ("2 January 2024", "2024"), ("May 5", "5"),
    *((f"\\boxed{{{text}}}", "42") for text in (
        "42\\alpha", "42\\hat{i}", "42\\, \\hat{\\imath}+3\\hat{\\jmath}", "42\\sin x", "42\\mathrm{e}", "42\\%\\text{ of }x",
        "42, 43, 44", "42, 43, 44, 45", "42+", "42 \\to 43", "42\\theta", "42 f(x)", "\\alpha 42", "x_{42}", "42\\text{th}",
    )),
]  # fmt: skip
UNCLEAR = [
    *((f"The answer is {text}", "42") for text in (
        "no more than 42", "not more than 42", "up to 42", "under 42", "over 42", "at most 42", "at least 42", "42 | 43", "42, 43 and 44",
        "42...43", "42..43", "42\u201443", "42 or 43", "42 (or 43)", "42+", "42 max", "42 if x > 0", "42 in base 8", "Chapter 42",
        "probably 42",
        "42? I'm not sure", "42. Hmm, 43.", "42. Should be 43", "42 short of 50", "42 fewer than needed",
    )),
    *((form % text, "42") for form in ("\\boxed{%s}", "#### %s", "The answer is %s.", "<answer>%s</answer>") for text in (
        "42'", "42''", "42 ab", "42 AD", "42\\text{ ab}", "42 \\mathrm{AD}", "42 q", "42 x",
    )),
    *((text, "42") for text in (
        "Ans: 42", "Result: 42", "Answer - 42", "answer 42", "Solution: 42", "A: 42", "The result is 42", "=> 42",
    )),
    ("The answer is 4 2", "4"), ("The answer is May 5", "5"), ("The answer is Jan 2", "2"), ("The answer is 2 January 2024", "2"),
    *((text, "42") for text in (
        "\\boxed{42} or 43", "\\boxed{42} + x", "\\boxed{42}, 43", "\\boxed{42} is wrong", "at most \\boxed{42}", "x < \\boxed{42}",
        "not \\boxed{42}", "2 \\times \\boxed{42}", "(x + 1) \\cdot \\boxed{42}", "I wrongly got \\boxed{42}.",
        "x = \\boxed{41} or x = \\boxed{42}",
        "\\boxed{42} is what you get if you forget the carry.", "The answer is 42 for n = 3 and 43 for n = 4",
        "The answer is 42.5, so 43.", "The answer is 42 in binary", "The answer is 42 (hex)",
    )),
    ("The answer is 42 for n = 3.", "3"), ("The answer is 42.5, so 43.", "42.5"),
]  # fmt: skip
NO_CHOICE = [
    ("The answer is C = 5", "C"), ("C = 5", "C"), ("5 \u00b0C", "C"), ("The answer is 5 \u00b0C", "C"), ("5 C", "C"), ("5 A", "A"),
    ("R&D", "D"),
    ("Group A", "A"), ("The answer is group B", "B"), ("B fails", "B"), ("B can be ruled out", "B"), ("cross out B", "B"),
    ("B does not work", "B"),
    ("If B, then C", "C"), ("Could be B, could be C", "C"), ("Could be B, could be C", "B"), ("Is it B?", "B"), ("Neither is B", "B"),
]  # fmt: skip
RIGHT = [
    *((text, "42", NUMBER) for text in (
        "\\boxed{\\phantom{1}42}", "Answer: John has 42 apples", "Answer: The total cost is $42.", "The answer is 42, since 6*7=42.",
        "So, the total is \\boxed{42} dollars.", "So John could buy 3, and has \\boxed{42} left.", "The answer is 42 miles per hour.",
        "\\boxed{42\\ \\mathrm{m/s}}", "Therefore, my final answer is 42.", "For 3 apples, the answer is 42",
        "It is clear that the answer is 42", "The answer is 42 for n = 3.", "The answer is 42 when $x = 7$.", "6 \\times 7 = \\boxed{42}",
        "* \\boxed{42}", "The answer is 42, so we stop at step C.",
        "The wrong answer is 41. The answer is 42.", "A student said the answer is 41. The answer is 42", "The answer is 42, not 41.",
        "The answer is approximately 42", "Each could take 7, so the answer is 42", "#### 42\n\nActually neat!",
        "\\boxed{42}\n\nWait for it!", "Answer: 42\nConfidence: 90", "The answer is 42\n\nStep 2", "It can be shown that the answer is 42",
    )),
    *((f"The answer is {text}", "42", NUMBER) for text in (
        "'42'", "\"42\"", "42\"", "42 min", "42 min.", "42 ft", "42 mi", "42 kW", "42 C", "42 a day",
        "\u20b942", "\u00a542", "\u20a9 42", "US$42", "Rs. 42", "Rs 42", "USD 42", "42<|im_end|>",
    )),
    ("\u7b54\u6848\u662f\uff1a**42**", "42", NUMBER), ("Die Antwort lautet 42.", "42", NUMBER),
    ("<answer>The answer is 42</answer>", "42", NUMBER), ("The answer is Paris<|im_end|>", "Paris", TEXT),
    ("The answer is B<|eot_id|>", "B", CHOICE),
    ("\\boxed{1 \\over 2}", "0.5", NUMBER), ("The answer is (1)/(2)", "1/2", NUMBER), ("Answer: $42K", "42000", NUMBER),
    ("The answer is \u00b9\u2044\u2082", "1/2", NUMBER), ("The answer is 3\u00b9\u2044\u2082", "3.5", NUMBER),
    ("The answer is 1\u2044\u2082", "0.5", NUMBER),
    ("The answer is option 'B'", "B", CHOICE), ("The answer is B because C would overflow", "B", CHOICE),
    ("The answer is <b>Paris</b>", "Paris", TEXT), ("The answer is Wait for Me", "Wait for Me", TEXT),
]  # fmt: skip
RIGHT_LOOSELY = [
    ("42c", "42", NUMBER), ("42 in every 100", "42", NUMBER), ("1\\over 2", "0.5", NUMBER), ("not more than 5", "5", NUMBER),
    ("The answer is 42. Sorry, I meant 43.", "43", NUMBER), ("\\boxed{42}. Sorry, I meant 43.", "43", NUMBER),
    ("option b is right", "B", CHOICE), ("C is right since D would overflow", "C", CHOICE), ("A can be ruled out, so B", "B", CHOICE),
    ("The answer is Paris. Wait, no, Rome.", "Rome", TEXT), ("<b>Paris</b>", "Paris", TEXT),
]  # fmt: skip


def _verdict(text: str, gold: str, kind: str, extract: str) -> float | None:
    return answer([""], [text], answer=[gold], kind=kind, extract=extract)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "gold", "kind"), DENIED + TAKEN_BACK)
@pytest.mark.parametrize("extract", ["strict", "flexible"])
def test_an_answer_that_the_text_denies_or_takes_back_fails(text: str, gold: str, kind: str, extract: str) -> None:
    assert _verdict(text, gold, kind, extract) == 0.0


@pytest.mark.parametrize(("text", "gold"), STRUCTURES)
@pytest.mark.parametrize("extract", ["strict", "flexible"])
def test_a_part_of_a_structure_is_no_number(text: str, gold: str, extract: str) -> None:
    assert _verdict(text, gold, NUMBER, extract) == 0.0


@pytest.mark.parametrize(("text", "gold", "kind"), [*SOMEONE_ELSES, *((*entry, NUMBER) for entry in UNCLEAR)])
def test_a_marked_answer_that_is_not_understood_whole_has_no_strict_verdict(text: str, gold: str, kind: str) -> None:
    assert _verdict(text, gold, kind, "strict") == 0.0


@pytest.mark.parametrize(("text", "gold"), NO_CHOICE)
def test_a_letter_that_is_no_choice(text: str, gold: str) -> None:
    assert [_verdict(text, gold, CHOICE, extract) for extract in ("strict", "flexible")] == [0.0, 0.0]


@pytest.mark.parametrize(("text", "gold", "kind"), RIGHT)
@pytest.mark.parametrize("extract", ["strict", "flexible"])
def test_a_right_answer_in_usual_words_passes(text: str, gold: str, kind: str, extract: str) -> None:
    assert _verdict(text, gold, kind, extract) == 1.0


@pytest.mark.parametrize(("text", "gold", "kind"), RIGHT_LOOSELY)
def test_a_right_answer_that_only_the_flexible_extractor_reads(text: str, gold: str, kind: str) -> None:
    assert _verdict(text, gold, kind, "flexible") == 1.0


def test_a_json_list_of_accepted_texts_is_itself_accepted() -> None:
    for said in ("a", "b", '["a", "b"]'):
        assert _verdict(said, '["a", "b"]', TEXT, "flexible") == 1.0
    assert _verdict('["a"]', '["a", "b"]', TEXT, "flexible") == 0.0


@pytest.mark.parametrize(
    "part",
    [
        "\\begin{a}",
        "B because ",
        "if B ",
        "wrong answer is 1. ",
        "1 \\over ",
        "{1 ",
        "0.(",
        "so the ",
        "I mean ",
        "$1",
        "answer is 1 to ",
    ],
)
def test_a_repeated_part_is_judged_within_bounds(part: str) -> None:
    with bounded(seconds=30):
        for kind in (NUMBER, CHOICE, TEXT):
            for extract in ("strict", "flexible"):
                assert _verdict(part * (20_000 // len(part)), "5", kind, extract) in (0.0, 1.0)
