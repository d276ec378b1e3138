"""Word problems with large numbers and a calculator: the model calls the tool, reads its result, and answers.

A turn that contains `calc(23 * 48)` is answered with the result; a turn without a call is the answer and ends the conversation.

Example:
    >>> called("First calc(23 * 48)."), called("The answer is 1104.")
    ('1104', None)
    >>> called("calc(1 / 0)"), called("calc(import os)")
    ('error: 1 / 0 has no value', 'error: import os has no value')
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.environments import word_problems
from posttrain.environments.base import Conversation, Environment
from posttrain.environments.expressions import expression_value
from posttrain.environments.parts import Kind, Row

INSTRUCTION = "Write calc(expression) to use the calculator. Then write the answer."
_CALL = re.compile(r"calc\(([^()\n]{0,80})\)")


def rows(kind: Kind, count: int, seed: int, *, largest: int = 5000, two_steps: float = 0.5) -> list[Row]:
    """Return `count` rows of one table: conversations whose demonstrations call the tool once.

    Raises:
        ConfigError: `largest` allows too few questions.
    """
    return [_row(kind, row) for row in word_problems.rows(kind, count, seed, largest=largest, two_steps=two_steps)]


def step(conversation: Conversation) -> list[dict[str, Any]] | None:
    """Return the tool's result as a message, or None if the turn calls no tool."""
    result = called(conversation.said)
    return None if result is None else [{"role": "tool", "content": result}]


def called(text: str) -> str | None:
    """Return the result of the last call in a turn, an error if it has no value, or None without a call."""
    calls = _CALL.findall(text)
    if not calls:
        return None
    value = expression_value(calls[-1])
    return f"error: {calls[-1].strip()} has no value" if value is None else str(value)


def _row(kind: Kind, row: Row) -> Row:
    prompt = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row["prompt"]}]
    answers = {name: _conversation(row[name]) for name in ("completion", "chosen", "rejected") if name in row}
    return row | {"prompt": prompt} | answers


def _conversation(working: str) -> list[dict[str, Any]]:
    """Return the turns of a working such as `23 * 48 = 1104`: the call, the tool's result, and the answer."""
    expression, answer = working.split(" = ")
    call = {"role": "assistant", "content": f"calc({expression})"}
    return [call, {"role": "tool", "content": answer}, {"role": "assistant", "content": answer}]


ENVIRONMENT = Environment("calculator", rows, word_problems.judge, step)
