"""Word problems in plain English: rows with short workings, and a judge that reads the last number.

A problem has one or two steps. Its working is the equation, and the answer is the number after the equals sign. A careless working uses the
wrong sign in one step, or forgets the second step, so its answer is wrong.

Example:
    >>> problem = Problem("Tom has 12 apples and finds 7 more. How many apples does Tom have?", 12, (("+", 7),))
    >>> problem.working(), problem.answer
    ('12 + 7 = 19', 19)
    >>> judge("12 + 7 = 19, so Tom has 19 apples.", "19"), judge("12 - 7 = 5", "19"), judge("No idea.", "19")
    (1.0, 0.0, 0.0)
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from posttrain.environments.base import Environment
from posttrain.environments.numbers import NUMBER, parse_number
from posttrain.environments.parts import Kind, Row, distinct

Step = tuple[str, int]
"""A sign and the number after it."""

_NAMES = ("Anna", "Ben", "Eva", "Jack", "Lucy", "Max", "Mia", "Noah", "Sam", "Sue", "Tim", "Tom")
_THINGS = ("apples", "balls", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stickers")
_SIGNS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_OTHER_SIGN = {"+": "-", "-": "+", "*": "+"}
_LAST_NUMBER = re.compile(rf"(?<![\w.,])({NUMBER})(?!\w)")

_ONE_STEP: tuple[tuple[str, str], ...] = (
    ("+", "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?"),
    ("+", "There are {a} {things} on the table and {b} in the box. How many {things} are there in all?"),
    ("+", "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} does {other} have?"),
    ("-", "{name} had {a} {things} and gave {b} to {other}. How many {things} are left?"),
    ("-", "{name} has {a} {things}. {other} has {b} fewer. How many {things} does {other} have?"),
    ("-", "{name} wants {a} {things} and has {b}. How many more {things} does {name} need?"),
    ("*", "There are {a} boxes with {b} {things} each. How many {things} are there?"),
    ("*", "{name} buys {a} bags. Each bag holds {b} {things}. How many {things} does {name} have?"),
)
_TWO_STEPS: tuple[tuple[str, str, str], ...] = (
    ("+", "-", "{name} has {a} {things}, finds {b} more and loses {c}. How many {things} does {name} have now?"),
    ("-", "+", "{name} had {a} {things}, gave away {b} and then got {c}. How many {things} does {name} have now?"),
    ("-", "-", "There were {a} {things}. {name} took {b} and {other} took {c}. How many {things} are left?"),
    ("+", "+", "{name} has {a} {things}, {other} has {b}, and there are {c} in the box. How many {things} are there in all?"),
    ("*", "+", "{name} buys {a} bags of {b} {things} and finds {c} more. How many {things} does {name} have?"),
    ("*", "-", "{name} has {a} boxes of {b} {things} and sells {c} of them. How many {things} are left?"),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A question with its solution: a first number, and the steps from it to the answer, computed from left to right."""

    question: str
    first: int
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        """Return the number after the last step."""
        value = self.first
        for sign, number in self.steps:
            value = _SIGNS[sign](value, number)
        return value

    def working(self) -> str:
        """Return the equation, such as `3 * 5 + 2 = 17`."""
        written = "".join(f" {sign} {number}" for sign, number in self.steps)
        return f"{self.first}{written} = {self.answer}"

    def careless(self, rng: random.Random) -> Problem:
        """Return the problem with a wrong step: a different sign, or one step too few."""
        if len(self.steps) > 1 and rng.random() < 0.5:
            return replace(self, steps=self.steps[:-1])
        place = rng.randrange(len(self.steps))
        sign, number = self.steps[place]
        steps = (*self.steps[:place], (_OTHER_SIGN[sign], number), *self.steps[place + 1 :])
        changed = replace(self, steps=steps)
        # 2 * 2 = 2 + 2: then the number is wrong, not the sign
        return changed if changed.answer != self.answer else replace(self, steps=(*self.steps[:-1], ("+", number + 1)))


def rows(
    kind: Kind, count: int, seed: int, *, largest: int = 50, two_steps: float = 0.5, careless: float = 0.0
) -> list[Row]:
    """Return `count` rows of one table. No two tables share a question.

    Args:
        largest: the largest number in sums and differences; factors are at most 9.
        two_steps: share of problems with two steps.
        careless: share of demonstrations with a wrong working.

    Raises:
        ConfigError: `largest` allows too few questions.
    """
    rng = random.Random(f"word_problems/{kind}/{seed}")
    draws = _draws(rng, largest, two_steps, 20 * count + 1000)
    hint = f"data.environments.word_problems (largest = {largest}) allows few questions: raise it, or lower the number of rows."
    return [_row(kind, problem, rng, careless) for problem in distinct(kind, count, draws, _question, hint)]


def judge(completion: str, answer: str) -> float:
    """Return 1 if the last number of the completion equals the answer, else 0."""
    found = _LAST_NUMBER.findall(completion)
    said = parse_number(found[-1]) if found else None
    return float(said is not None and said == parse_number(answer))


def _row(kind: Kind, problem: Problem, rng: random.Random, careless: float) -> Row:
    asked = {"prompt": problem.question}
    if kind == "sft":
        shown = problem.careless(rng) if rng.random() < careless else problem
        return asked | {"completion": shown.working()}
    if kind == "preferences":
        pair = {"chosen": problem.working(), "rejected": problem.careless(rng).working()}
        return asked | pair | {"chosen_score": 1.0, "rejected_score": 0.0}
    return asked | {"answer": str(problem.answer)}


def _question(problem: Problem) -> str:
    return problem.question


def _draws(rng: random.Random, largest: int, two_steps: float, count: int) -> Iterator[Problem]:
    for _ in range(count):
        names = rng.sample(_NAMES, 2)
        words = {"name": names[0], "other": names[1], "things": rng.choice(_THINGS)}
        *signs, template = rng.choice(_TWO_STEPS) if rng.random() < two_steps else rng.choice(_ONE_STEP)
        first, steps = _numbers(rng, signs, largest)
        spelled = dict(zip("abc", (first, *(number for _, number in steps)), strict=False))
        yield Problem(template.format(**words, **spelled), first, steps)


def _numbers(rng: random.Random, signs: list[str], largest: int) -> tuple[int, tuple[Step, ...]]:
    """Return the first number and the steps; no value on the way is below 1."""
    if signs[0] == "*":
        first, factor = rng.randint(2, 9), rng.randint(2, 9)
        value, steps = first * factor, [("*", factor)]
    else:
        first = value = rng.randint(3, largest)
        steps = []
    for sign in signs[len(steps) :]:
        left = len(signs) - len(steps)  # each later subtraction needs something to take away
        number = rng.randint(1, max(1, min(largest, value - left))) if sign == "-" else rng.randint(2, largest)
        value = _SIGNS[sign](value, number)
        steps.append((sign, number))
    return first, tuple(steps)


ENVIRONMENT = Environment("word_problems", rows, judge)
