"""Generated additions and the judge of their answers."""

from __future__ import annotations

import itertools
import json
import re
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environments.arithmetic import (
    answer_value,
    answers_equal,
    careless_scratchpad,
    carried_columns,
    final_answer,
    rows,
    scratchpad,
)
from posttrain.environments.expressions import expression_value
from posttrain.environments.numbers import parse_number
from posttrain.environments.parts import KINDS, Kind
from posttrain.errors import ConfigError

TERMS = st.lists(st.integers(1, 10**6), min_size=2, max_size=8)
SMALL = {"terms": 2, "max_term": 50, "careless": 0.5}


def test_scratchpad_works_column_by_column_with_the_carry_first() -> None:
    assert scratchpad([17, 48, 9], 2) == "7+8=15+9=24;2+1=3+4=7+0=7;#74"
    assert scratchpad([99, 1], 2) == "9+1=10;1+9=10+0=10;#100"


def test_a_terse_scratchpad_names_totals_only() -> None:
    assert scratchpad([17, 48, 9], 2, notation="terse") == "7+8+9=24;1+4+0+2=7;#74"
    assert scratchpad([17, 48, 9], 2, forgotten=1, notation="terse") == "7+8+9=24;1+4+0+0=5;#54"
    made = [rows("sft", 20, 1, notation=notation, **SMALL) for notation in ("chain", "terse")]
    assert [row["prompt"] for row in made[0]] == [row["prompt"] for row in made[1]]
    for chain, terse in zip(*made, strict=True):
        assert chain["completion"] != terse["completion"]
        assert final_answer(chain["completion"]) == final_answer(terse["completion"])


def test_a_forgotten_carry_is_carried_into_the_answer() -> None:
    assert scratchpad([17, 48, 9], 2, forgotten=1) == "7+8=15+9=24;0+1=1+4=5+0=5;#54"
    assert scratchpad([955, 166], 3, forgotten=2) == "5+6=11;1+5=6+6=12;0+9=9+1=10;#1021"


@given(TERMS)
def test_every_equation_of_a_scratchpad_holds_and_the_answer_is_the_sum(numbers: list[int]) -> None:
    text = scratchpad(numbers, 7)
    for column in text.split(";")[:-1]:
        sums = [int(part) for part in re.findall(r"=(\d+)", column)]
        values = [int(part) for part in re.findall(r"(?:^|\+)(\d+)", column)]
        assert sums == list(itertools.accumulate(values))[1:]
    assert final_answer(text) == str(sum(numbers))


@given(TERMS.filter(lambda numbers: bool(carried_columns(numbers, 7))), st.integers())
def test_careless_scratchpads_are_wrong(numbers: list[int], seed: int) -> None:
    text = careless_scratchpad(numbers, 7, Random(seed))
    assert int(final_answer(text) or -1) not in (-1, sum(numbers))


@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_carries(kind: Kind) -> None:
    for row in rows(kind, 40, 0, **SMALL):
        assert sum(int(term[-1]) for term in row["prompt"].strip("=").split("+")) >= 10


def test_default_scratchpads_are_short() -> None:
    table = rows("sft", 500, 0, terms=3, max_term=99, careless=0.5)
    assert max(len(row["completion"]) for row in table) <= 40


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_for_a_seed_and_unique(kind: Kind) -> None:
    first = rows(kind, 40, 7, **SMALL)
    assert first == rows(kind, 40, 7, **SMALL)
    assert first != rows(kind, 40, 8, **SMALL)
    assert len({row["prompt"] for row in first}) == 40


def test_no_sum_is_in_two_tables_whatever_the_seeds() -> None:
    sums = {kind: {_sum(row["prompt"]) for seed in range(3) for row in rows(kind, 60, seed, **SMALL)} for kind in KINDS}
    for one, other in itertools.combinations(KINDS, 2):
        assert not sums[one] & sums[other]


def _sum(prompt: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, prompt.strip("=").split("+"))))


def test_the_careless_share_is_the_share_of_wrong_answers() -> None:
    for share in (0.0, 0.25, 1.0):
        table = rows("sft", 800, 0, terms=3, max_term=99, careless=share)
        wrong = sum(int(final_answer(row["completion"]) or -1) != sum(_sum(row["prompt"])) for row in table) / 800
        assert wrong == pytest.approx(share, abs=0.05)


def test_pairs_prefer_the_right_answer_and_score_the_wrong_one_by_closeness() -> None:
    for row in rows("preferences", 100, 0, terms=3, max_term=99, careless=0.5):
        gold, wrong = sum(_sum(row["prompt"])), int(final_answer(row["rejected"]) or -1)
        assert final_answer(row["chosen"]) == str(gold)
        assert row["chosen_score"] == 1.0
        assert row["rejected_score"] == 1 - abs(gold - wrong) / max(gold, wrong)
        assert 0 <= row["rejected_score"] < 1


def test_too_small_a_space_says_how_many_there_are_and_what_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"data\.evaluation\.rows = 50: only \d+ .* max_term = 9.*raise either"):
        rows("evaluation", 50, 0, terms=2, max_term=9, careless=0.5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200", 1200), ("1200", 1200), ("1200.0", 1200), ("$1,200.00", 1200), ("-5", -5), ("\u22125", -5), ("$-5", -5),
        ("+7", 7), (".5", Fraction(1, 2)), ("5.", 5), ("1/3", Fraction(1, 3)), ("50%", 50), ("2e3", 2000), ("0.1", Fraction(1, 10)),
        (" 42 ", 42), ("1,234,567.8", Fraction(12345678, 10)),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1,2", "12,34", "1/0", "--5", "-$-5", "1 200", "nan", "inf", "1e9999", "٣", "5 apples", "9" * 201]
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@given(st.text(max_size=30))
def test_no_text_breaks_the_reading_of_numbers(text: str) -> None:
    parse_number(text)
    expression_value(text)
    found = final_answer(text)
    assert found is None or found in text


@given(st.integers(-(10**12), 10**12))
def test_an_integer_equals_itself_however_it_is_written(n: int) -> None:
    for written in (f"{n:,}", f"{n}.0", f"#### {n:,}", f"{n}.000"):
        assert answers_equal(written, str(n))
        assert not answers_equal(written, str(n + 1))


def test_decimals_have_no_float_pitfalls() -> None:
    assert answers_equal("0.30", "0.3")
    assert not answers_equal("9007199254740993", "9007199254740992")
    assert not answers_equal("0.1000000000000000055", "0.1")


def test_a_gold_answer_that_is_no_number_equals_nothing() -> None:
    for gold in ("", "about ten", "nan", "####", "#### ?"):
        assert not answers_equal(gold, gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+8=15;#74", "74"), ("...\n#### 1,200", "1,200"), ("so #### $18.", "$18"), ("#7;#8", "8"), ("A: 18", "18"),
        ("She makes 18.", "18"), ("it is -3", "-3"), ("#", None), ("5;#", None), ("#x 5", None), ("no number", None),
        ("18 apples", None), ("", None), ("#74+5", None), ("#12ab", None), ("v1.2.3", None), ("#### 40\n\nmore", "40"),
    ],
)  # fmt: skip
def test_the_final_answer_is_after_the_last_marker_or_ends_the_text(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.real
def test_every_gold_answer_of_gsm8k_is_a_number_that_its_solution_ends_in(shared_data: Path) -> None:
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 1319
    for text in answers:
        gold = text.rpartition("#### ")[2]
        assert answer_value(gold) is not None
        assert answers_equal(final_answer(text) or "", gold)


@pytest.mark.real
def test_graded_gsm8k_solutions_are_judged_as_their_graders_did(shared_data: Path) -> None:
    lines = (shared_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    agree = total = 0
    for record in map(json.loads, lines):
        gold = record["ground_truth"].rpartition("A: ")[2]
        for model in ("6b_finetuning", "175b_verification"):
            found = final_answer(record[model]["solution"])
            agree += record[model]["is_correct"] == (found is not None and answers_equal(found, gold))
            total += 1
    assert total == 2638
    assert agree >= 0.99 * total


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( ( 4.0 - 2.0 ) + 3.0 )", 5), ("1/3", Fraction(1, 3)), ("-2 * 3", -6), ("1/0", None), ("2**9", None),
        ("f(1)", None), ("", None), ("True+1", None), ("1+" * 200 + "1", 201), ("(" * 240 + "1" + ")" * 240, None),
    ],
)  # fmt: skip
def test_equations_have_an_exact_value_or_none(text: str, value: Fraction | None) -> None:
    assert expression_value(text) == value
