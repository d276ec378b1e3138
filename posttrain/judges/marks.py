"""Read verdicts in double brackets, [[A]], [[B]], [[C]] for a tie, or [[7]], as in MT-Bench (2306.05685).

The last one counts, if its line has no other, or if words between the two take the other back.

Example:
    >>> marked_verdict("A is right, so [[A]]"), marked_verdict("[[B]] ... no, they are equal: [[C]]"), marked_verdict("A!")
    ('A', 'tie', None)
    >>> marked_grade("2 errors, so [[7.5]]", 1, 10), marked_grade("[[7]] out of [[10]]", 1, 10), marked_grade("[[99]]", 1, 10)
    (7.5, None, None)
"""

from __future__ import annotations

import re
from typing import Literal

from posttrain.text import after_reasoning

Choice = Literal["A", "B", "tie"]
_CHOICES: dict[str, Choice] = {"A": "A", "B": "B", "C": "tie"}
_PAIR = re.compile(r"\[\[([ABC])\]\]")
_SCORE = re.compile(r"\[\[(\d{1,6}(?:\.\d+)?)\]\]")
_CORRECTED = re.compile(r"\b(?:no|wait|actually|sorry|correction|rather)\b", re.IGNORECASE)
"""Words between two verdicts after which the last one counts."""


def has_verdict_mark(reply: str) -> bool:
    """Return True if the reply has a verdict in brackets after its reasoning."""
    return _PAIR.search(after_reasoning(reply)) is not None


def has_grade_mark(reply: str) -> bool:
    """Return True if the reply has a number in brackets after its reasoning."""
    return _SCORE.search(after_reasoning(reply)) is not None


def marked_verdict(reply: str) -> Choice | None:
    """Return the answer that the last mark prefers, or `tie`; None without one, or if its line has several."""
    found = _last(_PAIR, reply)
    return None if found is None else _CHOICES[found]


def marked_grade(reply: str, low: float, high: float) -> float | None:
    """Return the last number in brackets; None without one, if its line has several, or if it is not from `low` to `high`."""
    found = _last(_SCORE, reply)
    number = None if found is None else float(found)
    return number if number is not None and low <= number <= high else None


def _last(pattern: re.Pattern[str], reply: str) -> str | None:
    """Return the last match; None if its line has a different one that no word between them corrects, as in `[[7]] out of [[10]]`."""
    lines = [found for line in after_reasoning(reply).splitlines() if (found := list(pattern.finditer(line)))]
    if not lines:
        return None
    last = lines[-1][-1]
    other = next((match for match in reversed(lines[-1]) if match[1] != last[1]), None)
    if other is not None and not _CORRECTED.search(last.string, other.end(), last.start()):
        return None
    return last[1]
