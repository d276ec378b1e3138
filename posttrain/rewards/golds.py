"""Read the column of gold answers.

Example:
    >>> gold_texts("answer", ["7", 7, 7.5])
    ['7', '7', '7.5']
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from posttrain.errors import DataError


def gold_texts(reward: str, golds: Sequence[Any]) -> list[str]:
    """Return the gold answers as texts; numbers become their digits.

    Raises:
        DataError: a gold answer is neither a text nor a number.
    """
    return [_text(reward, row, gold) for row, gold in enumerate(golds)]


def _text(reward: str, row: int, gold: Any) -> str:
    if isinstance(gold, str):
        return gold
    if isinstance(gold, Real) and gold is not True and gold is not False:
        return str(int(gold)) if isinstance(gold, Integral) else str(float(gold))
    raise DataError(
        f"the reward `{reward}`: the gold answer of row {row} is {gold!r} ({type(gold).__name__}), which no completion could match. Give a"
        ' text or a number; several accepted answers are one text: ["7", "seven"]'
    )
