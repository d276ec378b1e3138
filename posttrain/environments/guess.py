"""Guess a hidden number: after each guess the environment says whether the number is higher or lower.

Demonstrations halve the range, so that they need at most log2 of its size guesses. A rejected conversation starts at the end of the range
that is farther away, and gives up after its second guess.

Example:
    >>> asked = Conversation(({"role": "user", "content": "…"}, {"role": "assistant", "content": "Is it 12?"}), {"answer": "15"}, turn=1)
    >>> step(asked)
    [{'role': 'user', 'content': 'higher'}]
    >>> [turn["content"] for turn in halving(low=10, high=17, hidden=15)]
    ['13', 'higher', '15']
"""

from __future__ import annotations

import random
import re
from typing import Any

from posttrain.environments.base import Conversation, Environment
from posttrain.environments.parts import Kind, Row, distinct

_NUMBER = re.compile(r"-?\d{1,9}")
Range = tuple[int, int]


def rows(kind: Kind, count: int, seed: int, *, largest: int = 500, widest: int = 16) -> list[Row]:
    """Return `count` rows of one table; every row has its own range of numbers.

    Args:
        largest: the largest start of a range.
        widest: the most numbers of a range; the fewest are 4.

    Raises:
        ConfigError: there are too few ranges.
    """
    rng = random.Random(f"guess/{kind}/{seed}")
    starts = ((rng.randint(1, largest), rng.randint(4, max(4, widest))) for _ in range(20 * count + 1000))
    hint = f"data.environments.guess (largest = {largest}, widest = {widest}) allows few ranges: raise either, or lower the number of rows."
    ranges = distinct(kind, count, ((low, low + size - 1) for low, size in starts), _question, hint)
    return [_row(kind, span, rng) for span in ranges]


def step(conversation: Conversation) -> list[dict[str, Any]] | None:
    """Return the hint that follows a guess, or None if it is right."""
    guess, hidden = _guess(conversation.said), int(conversation.columns["answer"])
    if guess == hidden:
        return None
    hint = "Write a number." if guess is None else "higher" if hidden > guess else "lower"
    return [{"role": "user", "content": hint}]


def judge(completion: str, answer: str) -> float:
    """Return 1 if the guess is right, else 0."""
    return float(_guess(completion) == int(answer))


def halving(low: int, high: int, hidden: int) -> list[dict[str, Any]]:
    """Return the turns that follow the question if every guess halves what is left."""
    turns: list[dict[str, Any]] = []
    while True:
        guess = (low + high) // 2
        turns.append({"role": "assistant", "content": str(guess)})
        if guess == hidden:
            return turns
        turns.append({"role": "user", "content": "higher" if hidden > guess else "lower"})
        low, high = (guess + 1, high) if hidden > guess else (low, guess - 1)


def _guess(text: str) -> int | None:
    found = _NUMBER.findall(text)
    return int(found[-1]) if found else None


def _question(span: Range) -> str:
    return f"I think of a number from {span[0]} to {span[1]}. Guess it."


def _row(kind: Kind, span: Range, rng: random.Random) -> Row:
    low, high = span
    hidden = rng.randint(low, high)
    prompt = [{"role": "user", "content": _question(span)}]
    if kind == "sft":
        return {"prompt": prompt, "completion": halving(low, high, hidden)}
    if kind == "preferences":
        far = low if hidden - low > high - hidden else high
        hint = "higher" if far == low else "lower"
        turns = (("assistant", str(far)), ("user", hint), ("assistant", str(far)))
        rejected = [{"role": role, "content": text} for role, text in turns]
        return {"prompt": prompt, "chosen": halving(low, high, hidden), "rejected": rejected}
    return {"prompt": prompt, "answer": str(hidden)}


ENVIRONMENT = Environment("guess", rows, judge, step)
