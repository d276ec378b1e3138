"""Additions with a scratchpad: rows, answers and their judge.

Terms are written with leading zeros, so that a digit's place indicates its column. The scratchpad goes column by column from the right.
Each column is a running sum; all but the first begin with the carry:

    17+48+09=   7+8=15+9=24;2+1=3+4=7+0=7;#74

A terse scratchpad names only the total of each column, terms first and the carry last: `7+8+9=24;1+4+0+2=7;#74`.
Every sum carries at least once. A careless scratchpad forgets one of its carries, so that its answer is wrong.

Example:
    >>> prompt((17, 48, 9), width=2) + scratchpad((17, 48, 9), width=2)
    '17+48+09=7+8=15+9=24;2+1=3+4=7+0=7;#74'
    >>> final_answer("1+2=3;#33"), answers_equal("#33", "33.0")
    ('33', True)
    >>> rows("problems", 1, seed=0, terms=2, max_term=99, careless=0.0)
    [{'prompt': '35+85=', 'answer': '120'}]
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Literal

from posttrain.environments.base import Environment
from posttrain.environments.numbers import NUMBER, parse_number
from posttrain.environments.parts import Kind, Row, distinct

_MARKED = re.compile(rf"\s*({NUMBER})(?![\w+*/=-])")
_TRAILING = re.compile(rf"(?<![\w.,])({NUMBER})[\s.!?)\]]*$")
Notation = Literal["chain", "terse"]
_ENUMERABLE = 100_000
"""Most prompts that are listed in full; a larger space is sampled."""


def rows(
    kind: Kind,
    count: int,
    seed: int,
    *,
    terms: int,
    max_term: int,
    careless: float,
    notation: Notation = "chain",
) -> list[Row]:
    """Return `count` rows of one table. No two tables share a prompt or a reordering of its terms.

    Raises:
        ConfigError: `terms` and `max_term` do not allow so many prompts.
    """
    rng = random.Random(f"arithmetic/{kind}/{seed}")
    hint = f"data.arithmetic (terms = {terms}, max_term = {max_term}) allows few sums: raise either, or lower the number of rows."
    sums = distinct(kind, count, _draws(rng, terms, max_term, count), _key, hint)
    width = len(str(max_term))
    asked = [{"prompt": prompt(numbers, width)} for numbers in sums]
    if kind == "sft":
        made = (_demonstration(numbers, width, rng, careless, notation) for numbers in sums)
        return [row | {"completion": text} for row, text in zip(asked, made, strict=True)]
    if kind == "preferences":
        return [row | _pair(numbers, width, rng) for row, numbers in zip(asked, sums, strict=True)]
    return [row | {"answer": str(sum(numbers))} for row, numbers in zip(asked, sums, strict=True)]


def prompt(numbers: Sequence[int], width: int) -> str:
    """Return the prompt of a sum, with each term padded to `width` digits."""
    return "+".join(f"{number:0{width}}" for number in numbers) + "="


def scratchpad(numbers: Sequence[int], width: int, forgotten: int | None = None, notation: Notation = "chain") -> str:
    """Return the worked addition, ending in `#` and the answer.

    Args:
        forgotten: the column, from the right, whose incoming carry is lost.
        notation: chain names every running sum, terse only the total of a column.
    """
    columns, answer, carry = [], 0, 0
    for column in range(width):
        if column == forgotten:
            carry = 0
        digits = [number // 10**column % 10 for number in numbers]
        total = carry + sum(digits)
        if notation == "chain":
            columns.append(_chain([carry, *digits] if column else digits))
        else:
            columns.append(f"{'+'.join(map(str, [*digits, carry] if column else digits))}={total}")
        carry = total // 10
        answer += (total if column == width - 1 else total % 10) * 10**column
    return ";".join([*columns, f"#{answer}"])


def careless_scratchpad(numbers: Sequence[int], width: int, rng: random.Random, notation: Notation = "chain") -> str:
    """Return a scratchpad that forgets one carry; its answer is wrong."""
    return scratchpad(numbers, width, rng.choice(carried_columns(numbers, width)), notation)


def carried_columns(numbers: Sequence[int], width: int) -> list[int]:
    """Return the columns with an incoming carry, counted from the right."""
    return [column for column in range(1, width) if sum(n % 10**column for n in numbers) >= 10**column]


def final_answer(text: str) -> str | None:
    """Return the number after the last `#` marker or, without a marker, the number at the end of the text."""
    if "#" in text:
        found = _MARKED.match(text.rpartition("#")[2])
    else:
        found = _TRAILING.search(text)
    return found[1].strip().removesuffix(".") if found else None


def answers_equal(answer: str, gold: str) -> bool:
    """Return True if both are numbers (bare, or marked as in `#### 42`) of equal value; anything else equals nothing."""
    value = answer_value(answer)
    return value is not None and value == answer_value(gold)


def judge(completion: str, answer: str) -> float:
    """Return 1 if the completion's final answer equals the gold answer, else 0."""
    found = final_answer(completion)
    return float(found is not None and answers_equal(found, answer))


def answer_value(answer: str) -> Fraction | None:
    """Return the value of an answer that is a number, bare or after a `#` marker; else None."""
    marked = final_answer(answer) if "#" in answer else answer
    return parse_number(marked) if marked is not None else None


def _chain(values: Sequence[int]) -> str:
    """Return a running sum such as `7+8=15+9=24`."""
    sums = list(itertools.accumulate(values))[1:]
    return str(values[0]) + "".join(f"+{value}={done}" for value, done in zip(values[1:], sums, strict=True))


def _demonstration(numbers: Sequence[int], width: int, rng: random.Random, careless: float, notation: Notation) -> str:
    if rng.random() < careless:
        return careless_scratchpad(numbers, width, rng, notation)
    return scratchpad(numbers, width, notation=notation)


def _pair(numbers: Sequence[int], width: int, rng: random.Random) -> Row:
    rejected = careless_scratchpad(numbers, width, rng)
    gold, wrong = sum(numbers), int(rejected.rpartition("#")[2])
    return {
        "chosen": scratchpad(numbers, width),
        "rejected": rejected,
        "chosen_score": 1.0,
        "rejected_score": 1.0 - abs(gold - wrong) / max(gold, wrong),
    }


def _key(numbers: Sequence[int]) -> str:
    return prompt(sorted(numbers), 1)


def _draws(rng: random.Random, terms: int, max_term: int, count: int) -> Iterator[tuple[int, ...]]:
    """Return the terms of sums that carry: all in random order if they can be listed, else random ones."""
    candidates: Iterable[tuple[int, ...]]
    if max_term**terms <= _ENUMERABLE:
        listed = list(itertools.product(range(1, max_term + 1), repeat=terms))
        rng.shuffle(listed)
        candidates = listed
    else:
        candidates = (tuple(rng.randint(1, max_term) for _ in range(terms)) for _ in range(100 * count + 1000))
    width = len(str(max_term))
    return (numbers for numbers in candidates if carried_columns(numbers, width))


ENVIRONMENT = Environment("arithmetic", rows, judge)
