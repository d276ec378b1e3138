"""Additions with a scratchpad: rows, answers and their judge.

Terms are written with leading zeros, so that a digit's place tells its column. The scratchpad goes column by column from
the right, each column a running sum; all but the first begin with the carry:

    17+48+09=   7+8=15+9=24;2+1=3+4=7+0=7;#74

A careless scratchpad drops one carry, or is off by one in one sum, and carries the mistake into its answer.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from posttrain.problems.numbers import NUMBER, parse_number
from posttrain.problems.parts import Kind, Row, distinct

_MARKED = re.compile(rf"\s*({NUMBER})(?![\w+*/=-])")
_TRAILING = re.compile(rf"(?<![\w.,])({NUMBER})[\s.!?)\]]*$")
_ENUMERABLE = 100_000
"""Prompts up to which all of them are listed; above, they are drawn."""
_DROP_CARRY = 0.7
"""Share of careless mistakes that drop a carry, where the sum has one."""


@dataclass(frozen=True)
class Mistake:
    """`drop` the carry into `column`, or else be off by `slip` in the sum of `column`; columns count from the right."""

    column: int
    slip: int = 0

    @property
    def drop(self) -> bool:
        return not self.slip


def rows(kind: Kind, count: int, seed: int, *, terms: int, max_term: int, careless: float) -> list[Row]:
    """`count` rows of one table. The tables of all kinds have no prompt in common, nor a reordering of one.

    Raises ConfigError where `terms` and `max_term` do not allow for so many prompts.
    """
    rng = random.Random(f"arithmetic/{kind}/{seed}")
    hint = (
        f"data.arithmetic (terms = {terms}, max_term = {max_term}) allows for few: raise either, or ask for fewer rows."
    )
    sums = distinct(kind, count, _draws(rng, terms, max_term, count), _key, hint)
    width = len(str(max_term))
    asked = [{"prompt": prompt(numbers, width)} for numbers in sums]
    if kind == "sft":
        return [row | _demonstration(numbers, width, rng, careless) for row, numbers in zip(asked, sums, strict=True)]
    if kind == "preferences":
        return [row | _pair(numbers, width, rng) for row, numbers in zip(asked, sums, strict=True)]
    return [row | {"answer": str(sum(numbers))} for row, numbers in zip(asked, sums, strict=True)]


def prompt(numbers: Sequence[int], width: int) -> str:
    return "+".join(f"{number:0{width}}" for number in numbers) + "="


def scratchpad(numbers: Sequence[int], width: int, mistake: Mistake | None = None) -> str:
    """The worked addition, ending in `#` and the answer; with `mistake`, wrong from there on."""
    columns, answer, carry = [], 0, 0
    for column in range(width):
        slip = mistake.slip if mistake and mistake.column == column else 0
        if mistake and mistake.drop and mistake.column == column:
            carry = 0
        digits = [number // 10**column % 10 for number in numbers]
        total = carry + sum(digits) + slip
        columns.append(_chain([carry, *digits] if column else digits, total))
        carry = total // 10
        answer += (total if column == width - 1 else total % 10) * 10**column
    return ";".join([*columns, f"#{answer}"])


def careless_scratchpad(numbers: Sequence[int], width: int, rng: random.Random) -> str:
    """A scratchpad with one mistake; its answer is wrong."""
    carried = [c for c in range(1, width) if sum(n % 10**c for n in numbers) >= 10**c]
    if carried and rng.random() < _DROP_CARRY:
        return scratchpad(numbers, width, Mistake(rng.choice(carried)))
    column = rng.randrange(width)
    empty = not any(number // 10**column % 10 for number in numbers)
    return scratchpad(numbers, width, Mistake(column, 1 if empty else rng.choice((-1, 1))))


def final_answer(text: str) -> str | None:
    """The number after the last `#` marker, or, without a marker, the number that ends the text."""
    if "#" in text:
        found = _MARKED.match(text.rpartition("#")[2])
    else:
        found = _TRAILING.search(text)
    return found[1].strip().removesuffix(".") if found else None


def answers_equal(answer: str, gold: str) -> bool:
    """Whether both are numbers (alone, or marked as in `#### 42`) of the same value. A gold answer that is none equals nothing."""
    value = answer_value(answer)
    return value is not None and value == answer_value(gold)


def answer_value(answer: str) -> Fraction | None:
    """The value of an answer that is a number, alone or after a `#` marker; else None."""
    marked = final_answer(answer) if "#" in answer else answer
    return parse_number(marked) if marked is not None else None


def _chain(values: Sequence[int], total: int) -> str:
    """`7+8=15+9=24`; the last sum is `total`, right or wrong."""
    sums = list(itertools.accumulate(values))[1:-1]
    steps = [f"+{value}={done}" for value, done in zip(values[1:], [*sums, total], strict=True)]
    return str(values[0]) + "".join(steps)


def _demonstration(numbers: Sequence[int], width: int, rng: random.Random, careless: float) -> Row:
    wrong = rng.random() < careless
    return {"completion": careless_scratchpad(numbers, width, rng) if wrong else scratchpad(numbers, width)}


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
    if max_term**terms <= _ENUMERABLE:
        everything = list(itertools.product(range(1, max_term + 1), repeat=terms))
        rng.shuffle(everything)
        yield from everything
    else:
        for _ in range(100 * count + 1000):
            yield tuple(rng.randint(1, max_term) for _ in range(terms))
