"""Verdicts of the reward `answer` on what models write: neither a wrong answer passes, nor does a right one fail."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from posttrain.data.limits import bounded
from posttrain.errors import DataError
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
    ("4\ufe0f\u20e32\ufe0f\u20e3", "42"), ("-\u200f7", "-7"), ("\u2066-42\u2069", "-42"), ("1\u200b000", "1000"), ("4\u200d2", "42"),
    ("\u0663\u066b\u0665", "3.5"), ("\u0661\u066c\u0660\u0660\u0660", "1000"), ("\uff13\uff0e\uff15", "3.5"), ("3\u20444", "3/4"),
    ("\uff11\uff0c\uff10\uff10\uff10", "1000"), ("\ufe637", "-7"), ("\u20117", "-7"), ("3 \u2215 4", "3/4"),
    ("\u7b54\u6848\uff1a\uff0d\uff17\u200b", "-7"),
    ("1 000", "1000"), ("1'000", "1000"), ("1_000", "1000"), ("1,00,000", "100000"), ("12,34,567", "1234567"), ("$5k", "5000"),
    ("90^\\circ", "90"), ("\\boxed{90^{\\circ}}", "90"), ("-5\u00b0C", "-5"), ("5kWh", "5"), ("5 m\u00b2", "5"), ("2**10", "1024"),
    ("The answer is 5. Wait, no, 6.", "6"), ("Answer: 5? No, 6", "6"), ("The answer is 5. Wait: 2 + 3 = 5. Yes.", "5"),
    ("It can't be 5; it is 6", "6"), ("The answer is 5 rather than 6", "5"), ("~~6~~ 5", "5"), ("<b>5</b>", "5"), ("2+3 => 5", "5"),
    ("> 5", "5"), ("5, because 5 > 3 and so it is 5", "5"), ("at least 5", "5"), ("5 and then 6", "6"),
    ("The answer is 5 hours 30 minutes = 330 minutes", "330"),
    ("<think>the answer is 6</think>5", "5"), ("<think>\\boxed{6}</think>So he has 5.", "5"), ("maybe 6\n</think>\n\nAnswer: 5", "5"),
    ("<|channel|>analysis<|message|>6?<|end|><|start|>assistant<|channel|>final<|message|>5", "5"),
    ("-\\boxed{7}", "-7"), ("$-\\boxed{7}$", "-7"), ("it is -\\boxed{\\frac{1}{2}}", "-0.5"), ("x = - \\boxed{7}", "-7"),
    ("- \\boxed{7}", "7"),
    ("9 - 2 = \\boxed{7}", "7"), ("9 - \\boxed{7} = 2", "7"), ("\\boxed{-(7)}", "-7"), ("f(2) = 7", "7"), ("half of 14 is 7", "7"),
    ("7 squared", "49"), ("7 squared is 49", "49"), ("7 times 2 is 14", "14"), ("7% of 200 is 14", "14"), ("\\boxed{\\cfrac{7}{2}}", "3.5"),
    ("The answer is seven point five", "7.5"), ("seven eighths", "7/8"), ("seven and a half", "7.5"), ("two and three quarters", "2.75"),
    ("The answer is 7 and a half", "7.5"), ("7 and 1/2", "7.5"), ("The answer is 7 and three quarters", "7.75"), ("one tenth", "0.1"),
    ("7 out of 10", "7"), ("page 7 of 8", "7"), ("from 7 to 8", "8"), ("7 (mod 8)", "7"), ("The answer is 7. That's right.", "7"),
    ("If the answer is 6, we fail. So it is 7", "7"), ("The answer is 6. That's wrong. It is 7", "7"), ("If so, the answer is 7.", "7"),
    ("The answer is 7. No doubt.", "7"), ("The answer is 5? No, 7", "7"), ("seven hundredths", "0.07"),
    ("The answer is 7 hundredths", "0.07"),
    ("The answer is 7. It is wrong to say 8.", "7"), ("two point five million", "2500000"), ("one and a half million", "1500000"),

    *((f"The answer is {text}", "42") for text in (
        "6*7, which is 42.", "6 * 7, that is 42", "40 + 2, i.e. 42", "40+2 which equals 42", "6 \u00d7 7 is **42**.", "$6 \\times 7$ = 42",
        "$40 + $2, which makes $42.",
    )),
    ("The answer is 1/2, which is 50%.", "1/2"), ("The answer is 42, which is 6 more than 36.", "42"), ("7 am I right", "7"),
    ("The answer is 7 m", "7"), ("7 feet in 6 in of snow: 7", "7"), ("7ft 6in = 90in; so 90", "90"),
    ("at most 7, so 6", "6"), ("The answer is at most 7, so 6", "6"), ("at least 7, hence 8", "8"), ("7 less", "7"), ("barely 7", "7"),
    ("|-7| = 7", "7"), ("7 halves", "3.5"), ("The answer is 7 - a prime", "7"),
    ("**-\\boxed{7}**", "-7"), ("$\\boxed{7}^\\circ$", "7"), ("7 y 8", "8"), ("$7/h", "7"),
    ("The answer is 7. Some say 8. That is wrong.", "7"),
    ("The answer is one twentieth", "0.05"), ("The answer is 5 twelfths", "5/12"), ("The answer is 1 half", "0.5"), ("two lakh", "200000"),
    ("\\boxed{2 \\text{ million}}", "2000000"), ("\\boxed{1\\;200}", "1200"), ("The answer is 3 / 4", "0.75"), ("#### -$5", "-5"),
    ("#### \\frac{1}{2}", "0.5"), ("1 tenth of 50 is 5", "5"), ("\\boxed{\\frac{ 1 }{ 2 }}", "0.5"),
    ("[THINK]6[/THINK]5", "5"), ("The answer is 5\n\nQuestion: What is 3+3?\nAnswer: 6", "5"), ("Question: 2+3?\nAnswer: 5", "5"),
]  # fmt: skip
WRONG = [
    *((text, "7") for text in ("7ft 6in", "7h 30m", "7kg 300 g", "7min 3s", "7 m and 30 cm", "The answer is 7ft 6in")),
    *((lead + text, "7") for lead in ("", "The answer is ") for text in (
        "7 PM", "7pm", "7 p.m.", "7 am", "7 a.m.", "7 o'clock", "seven pm", "7th", "the 7th", "6*7, which is 42.", "7 - 2, which is 5",
    )),
    ("The answer is 7 + 2, which is 5 more than 4.", "5"),
    ("hardly 7", "7"), ("The answer is hardly 7", "7"), ("scarcely 7", "7"), ("The answer is at most 7, so 6", "7"),
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
    ("-\\boxed{7}", "7"), ("\\boxed{-(7)}", "7"), ("\\boxed{-(x+7)}", "7"), ("\\boxed{7}^2", "7"), ("\\boxed{7}\\pi", "7"),
    *((f"The answer is {text}", "7") for text in (
        "sin(7)", "ln(7)", "sqrt(7)", "f(7)", "log 7", "7 squared", "7 factorial", "7 plus 2", "7 times 2", "half of 7", "7 pi",
        "7% of 200", "the cube of 7", "twice 7", "7 x 2", "7 to the power of 2", "7 over 8", "7 choose 2", "max(7, 2)", "7 or more",
        "7 and a half",
        "7 and 1/2", "7 to 8", "seven point five", "seven eighths", "seven and a half", "seven squared", "seven plus two", "less than 7",
        "7 less than 10", "7 hundredths", "seven hundredths", "pi/7", "7-choose-2", "7 doubled", "not necessarily 7", "7? No.", "7. Wrong!",
        "7. No, it's not.", "7 (wrong)", "7. Scratch that.", "7... no.",
    )),
    *((f"\\boxed{{{text}}}", "7") for text in (
        "\\log_2 7", "\\sin 7", "\\ln(7)", "7!", "[7,\\infty)", "(-\\infty,7]", "[7, \u221e)", "\\binom{7}{2}", "\\sqrt{\\frac{7}{1}}",
        "\\frac{7x}{1}", "\\overline{7}", "7 \\text{ or more}",
    )),
    ("\\boxed{\\frac{7x}{2}}", "2"), ("7 out of 10", "10"), ("page 7 of 8", "8"), ("7 to 8", "8"), ("1.2e 3", "3"), ("7 (mod 8)", "8"),
    ("7 isn't right", "7"), ("7 can't be right", "7"), ("anything except 7", "7"), ("twenty-fifth", "4"), ("x = 3, y = 7", "3"),
    ("The answer is x = 3, y = 7", "7"), ("The answer is 7. That's incorrect.", "7"), ("The answer is 7, which is wrong.", "7"),
    ("If the answer is 7, then we have a contradiction.", "7"), ("Suppose the answer is 7. Then no.", "7"), ("Is the answer 7?", "7"),
    *((f"{lead} the answer is 7", "7") for lead in ("I doubt", "I don't think", "It is false that", "Nobody says")),
    ("The answer is 7. Hmm, actually that is wrong.", "7"), ("The answer is |-7|", "-7"),
    *((f"\\boxed{{{text}}}", "7") for text in ("7 + x", "7 \\cdot x", "7 \\sqrt x", "7 y", "\\frac{7}{1}x", "\\lfloor 7.5 \\rfloor", "7x")),
    ("\\boxed{\\lceil 7 \\rceil}", "7.5"), ("7 halves", "7"),
    *((f"The answer is {text}", "7") for text in (
        "seven thirteenths", "7 thirteenths", "seven feet six", "seven below zero", "7 000,5", "7, 8 or 9", "7_{2}", "7^\\circ 30'",
        "seven in ten", "7{:}30",
    )),
    ("\\boxed{7\\text{ hours }30\\text{ minutes}}", "7"),
]  # fmt: skip
LETTERS = [
    ("The answer is not B but C", "C"), ("B is incorrect, C is right", "C"), ("(A) is wrong. (B) is right.", "B"),
    ("The correct option is B because A is wrong", "B"), ("The answer is B. Wait, no, C.", "C"), ("<think>maybe (C)</think>B", "B"),
    ("A, B, C, or D? D", "D"), ("A: no. B: yes.", "B"), ("A is better than B", "A"), ("A is worse than B", "B"), ("B beats A", "B"),
    ("C > A", "C"), ("A < C", "C"), ("I rank C > A > B", "C"), ("**C** >> **A**", "C"), ("B > A, so B", "B"),
    ("I pick a", "A"), ("Unlike A, B", "B"), ("A rather than B", "A"), ("C over B", "C"),
    ("The answer is B. That's wrong. C", "C"), ("A no, B no, C yes", "C"), ("A. 3\nB. 4\nC. 5\n\n**C**", "C"),
    ("(A) 3 (B) 4\nSo (B)", "B"),
    ("(A) because (B) fails", "A"),
    ("The answer is (A) because (B) is too small", "A"), ("A. No.\nB. Yes.", "B"), ("A. cat\nB. dog\n\nA", "A"),
    ("Option (C) looks right, though (D) is tempting. Final: C", "C"), ("(A) is close, (B) too. I choose C", "C"),
    ("(A) or (B)... My choice is **(B)**, not (A)", "B"), ("Option A, option B. Final choice: option A", "A"),
    ("I'll go with (B) over (A)", "B"),
    ("A The capital is Paris.", "A"), ("Answer: A Because it fits.", "A"), ("A. Paris", "A"), ("Option A Paris", "A"),
    ("A\nParis is it", "A"),
    ("A, B and D do not work. C works.", "C"), ("It must be D, as A, B, and C are incorrect.", "D"),
    ("\uff22", "B"), ("B, not A", "B"), ("Both A and B are wrong, so C", "C"), ("A. cats\nB. dogs\nAnswer: B", "B"),
]  # fmt: skip
NO_LETTER = [
    *(lead + name for lead in ("", "The answer is ", "Final: ") for name in (
        "A Christmas Carol", "C++", "C#", "A&W", "B-52", "C-3PO", "A+", "B. B. King", "A. A. Milne", "C Major",
        "B-flat", "A Tale of Two Cities",
    )),
    "I choose A or B",
    "Final: not C",
    "It is not B",
    "A = C",
    "It isn't (B)",
    "B is wrong",
    "A or B",
    "both A and B",
    "A/B",
    "Neither A nor B",
    "(A) 3 (B) 4 (C) 5",
    "A. cat\nB. dog",
    "All except B",
    "anything but B",
    "B would be incorrect",
    "vitamin B",
    "The answer is vitamin B",
    "B12",
    "The answer is B. That is wrong.",
    "I don't think the answer is B",
    "A, B, or C?",
    "The answer is A, B",
    "<think>B",
    "\\boxed{A} or \\boxed{B}",
]  # fmt: skip


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


def test_the_letter_of_a_species_is_no_choice() -> None:
    assert _verdict("E. coli is a bacterium, so B", "B", kind="choice") == 1.0
    assert _verdict("E. coli", "E", kind="choice") == 0.0
    assert _verdict("E. cold water", "E", kind="choice") == 1.0


@pytest.mark.parametrize("text", NO_LETTER)
def test_a_denied_letter_or_several_are_no_choice(text: str) -> None:
    assert [_verdict(text, gold, kind="choice") for gold in "ABC"] == [0.0, 0.0, 0.0]


def test_a_text_answer_follows_the_reasoning() -> None:
    assert _verdict("<think>London</think>Paris!", "Paris", kind="text") == 1.0
    assert _verdict("<think>Paris</think>London", "Paris", kind="text") == 0.0


TEXTS = [
    ("#### Paris", "Paris"), ("don\u2019t", "don't"), ("The answer is Paris because it is the capital", "Paris"),
    ("Answer: \"Paris\".", "Paris"),
    ("_Paris_", "Paris"), ("The answer is _Paris_", "Paris"), ("The answer is **Paris**", "Paris"), ("The answer is __init__", "__init__"),
    ("$\\text{Paris}$", "Paris"), ("**Answer:** Paris", "Paris"),
    ("**Answer: Paris.**", "Paris"),
    ("The answer is *args", "*args"),
    ("The answer is St. Paul. He was an apostle.", "St. Paul"), ("The answer is Dr. Smith. She has a clinic.", "Dr. Smith"),
    ("Paris. It is the capital.", "Paris"), ("The answer is Paris, since the king lived there", "Paris"),
    ("The answer is Death Because of Love", "Death Because of Love"), ("Paris because it is", "Paris"),
    ("?", "?"), ("**\"Paris\"**.", "Paris"),
]  # fmt: skip
NOT_TEXTS = [
    ("The answer is Death Because of Love", "Death"),
    ("The answer is Nothing since Monday", "Nothing"),
    ("The answer is St. Paul. He was an apostle.", "St"),
    ("The answer is St. Paul. He was an apostle.", "He was an apostle"),
    ("The answer is Paris. It is not the capital.", "Paris"),
    ("The answer is Paris. They say it isn't.", "Paris"),
    ("The answer is Paris. It was London, actually.", "Paris"),
    ("?", "!"),
    ("...", "?"),
    ("!!!", ""),
    ("", ""),
    ("$5", "5"),
    ("__init__", "init"),
    ("*args", "args"),
    ("Paris", "because"),
]


@pytest.mark.parametrize(("text", "gold"), TEXTS)
def test_a_text_equals_the_gold_answer(text: str, gold: str) -> None:
    assert _verdict(text, gold, kind="text") == 1.0


@pytest.mark.parametrize(("text", "gold"), NOT_TEXTS)
def test_signs_and_parts_of_names_are_not_taken_off_a_text(text: str, gold: str) -> None:
    assert _verdict(text, gold, kind="text") == 0.0


@pytest.mark.parametrize(("text", "gold"), [entry for entry in WRONG if "answer is" in entry[0] or "boxed" in entry[0]])
def test_a_wrong_answer_after_a_marker_fails_strictly(text: str, gold: str) -> None:
    assert _verdict(text, gold, extract="strict") == 0.0


@pytest.mark.parametrize("gold", ["7", "seven", "x=7", "#### 7", 7, 7.0])
def test_a_gold_answer_in_words_or_as_a_number_matches(gold: Any) -> None:
    assert answer([""], ["7"], answer=[gold]) == [1.0]


@pytest.mark.parametrize("gold", [None, True, [7], ["7"]])
def test_a_gold_answer_that_is_neither_text_nor_number_is_refused(gold: Any) -> None:
    with pytest.raises(DataError, match=r"`answer`: the gold answer of row 1 is .* Give a text or a number"):
        answer([""] * 2, ["7"] * 2, answer=["7", gold])


def test_a_letter_after_final_is_no_strict_answer() -> None:
    assert _verdict("(A) or (B)? Final: B", "B", kind="choice") == 1.0
    assert _verdict("(A) or (B)? Final: B", "B", kind="choice", extract="strict") == 0.0


def test_what_was_taken_back_is_no_strict_answer() -> None:
    assert _verdict("The answer is 5. Wait, no, 6.", "5", extract="strict") == 0.0
    assert _verdict("The answer is five.", "5", extract="strict") == 1.0


@pytest.mark.parametrize(
    "part",
    [
        "\nQ: ",
        "\nanswer is 1\nQ:",
        "<think>",
        "</think>",
        "1,",
        "not B ",
        "A or ",
        "twenty ",
        "wait 1 ",
        "< 5 ",
        "-\\boxed{",
        "\\frac{1",
        "f(1",
        "half of ",
        "7 and a ",
        "(7,",
        "A. ",
        "(A) 1 (B) ",
        "if the answer is ",
        "a point ",
        "\\sin{",
        "_",
    ],
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


@pytest.mark.parametrize(
    "text", ["The answer\u200b is 42", "####\u00a042", "The\u00a0answer\u202fis 42", "\u7b54\u6848\u200b\u662f42"]
)
def test_a_marker_is_found_between_characters_that_are_not_seen(text: str) -> None:
    assert answer([""], [text], answer=["42"], extract="strict") == [1.0]


@pytest.mark.parametrize("text", ["Par\u200bis", "\ufeffParis\u200f", "#### Paris\u200b", "The answer\u00a0is Paris."])
def test_words_are_compared_as_they_are_seen(text: str) -> None:
    assert answer([""], [text], answer=["Paris"], kind="text") == [1.0]
    assert answer([""], ["Paris"], answer=["\u2066Paris\u2069"], kind="text") == [1.0]
