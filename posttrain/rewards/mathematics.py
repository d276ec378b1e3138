"""Answers that are mathematics: LaTeX and expressions, compared by value with the optional package math-verify."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from posttrain.errors import RewardError
from posttrain.rewards import require_available

WARM_UP_SECONDS = 60
"""The parser builds its tables when first used, which no answer shall pay for."""
_DELIMITERS = ("$", "\\boxed", "\\[", "\\(")


def math(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], row_seconds: int = 5, **_: Any
) -> list[float | None]:
    """1 where the completion's last expression equals the gold answer, `\\frac{1}{2}` = 0.5 = 2/4, else 0.

    None where the gold answer is no mathematics (it can pass nobody), and where parsing or comparing took longer than `row_seconds`.
    Those limits are signals, so this runs in a main thread alone: a worker's, or that of a script.
    """
    require_available("math")
    if threading.current_thread() is not threading.main_thread():
        raise RewardError(
            "math bounds its time by signals and so works in a main thread only; give it a worker process"
        )
    _parsed("$1$", WARM_UP_SECONDS)
    return [_compared(text, gold, row_seconds) for text, gold in zip(completions, answer, strict=True)]


def _compared(completion: str, gold: str, seconds: int) -> float | None:
    from math_verify.errors import TimeoutException

    try:
        expected = _parsed(gold if any(mark in gold for mark in _DELIMITERS) else f"${gold}$", seconds)
        if not expected:
            return None
        return float(_equal(expected, _parsed(completion, seconds), seconds))
    except TimeoutException:
        return None


def _parsed(text: str, seconds: int) -> list[Any]:
    """What the text states, [] where that cannot be read: text that did not parse is never kept as text to be compared."""
    from math_verify import parse

    try:
        found: list[Any] = parse(text, fallback_mode="no_fallback", parsing_timeout=seconds, raise_on_error=True)
    except Exception:  # the parser raises what its grammar, SymPy and regular expressions raise
        return []
    return found


def _equal(expected: list[Any], found: list[Any], seconds: int) -> bool:
    from math_verify import verify

    try:
        return bool(verify(expected, found, timeout_seconds=seconds, raise_on_error=True))
    except Exception:  # SymPy could not compare the two, so they are not shown to be equal
        return False
