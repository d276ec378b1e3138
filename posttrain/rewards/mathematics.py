"""Score mathematical answers: LaTeX and expressions, compared by value with the optional package math-verify.

The package's own time limit rings once, and SymPy goes on if something on the way catches the exception. `bounded` rings until the code
ends.

Example:
    >>> from importlib.util import find_spec
    >>> if find_spec("math_verify"):
    ...     assert math(["1/2?"], ["It is $0.5$."], answer=["1/2"]) == [1.0]
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from posttrain.data.limits import bounded
from posttrain.errors import RewardError
from posttrain.rewards import require_available
from posttrain.rewards.boxes import signed_boxes
from posttrain.rewards.extraction import equal, flexible, gold_value
from posttrain.rewards.final_part import final_part
from posttrain.rewards.golds import gold_texts

WARM_UP_SECONDS = 60
"""The parser builds its tables on first use; that time is not charged to an answer."""
_PERCENT = re.compile(r"(?<=\d)\s?\\?%")
_PROSE = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|sqrt|pi)\b)[A-Za-z]{2,}")
_REPEATING = re.compile(
    r"(?P<whole>\d{1,30})\.(?P<once>\d{0,30})"
    r"(?:\\(?:overline|bar|dot)\s?(?:\{(?P<group>\d{1,30})\}|(?P<digit>\d))(?!\d*\\dot)"
    r"|\\dot\s?\{?(?P<first>\d)\}?(?P<between>\d{0,30})\\dot\s?\{?(?P<last>\d)\}?)"
)
"""A repeating decimal: 0.\\overline{3}, 1.2\\overline{34}, 0.\\dot{1}4285\\dot{7}."""
_DELIMITERS = ("$", "\\boxed", "\\[", "\\(")


def math(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], row_seconds: int = 5, **_: Any
) -> list[float | None]:
    """Return 1 if the last expression after the completion's reasoning equals the gold answer (`\\frac{1}{2}` = 0.5 = 2/4), else 0.

    `0.\\overline{3}` is 1/3, and `i` is the imaginary unit if that makes the two equal. A number in prose without LaTeX is read as `answer`
    reads it, and percent signs are ignored. The reward is None if the gold answer is not mathematics (no answer could match it), or if
    parsing and comparing took longer than `row_seconds` or 1 GiB of memory. The time limit uses signals, so this runs only in a main
    thread: a worker's, or a script's.
    """
    require_available("math")
    if threading.current_thread() is not threading.main_thread():
        raise RewardError(
            "math limits its time with signals, which work in the main thread only; run it in a worker process"
        )
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    with bounded(WARM_UP_SECONDS):
        _parsed("$1$")
    return [
        _compared(text, gold, row_seconds) for text, gold in zip(completions, gold_texts("math", answer), strict=True)
    ]


def _compared(completion: str, gold: str, seconds: int) -> float | None:
    try:
        with bounded(seconds):
            expected = _parsed(_delimited(_PERCENT.sub("", gold)))
            return _verdict(signed_boxes(final_part(completion)), gold, expected) if expected else None
    except (TimeoutError, MemoryError):
        return None


def _verdict(said: str, gold: str, expected: list[Any]) -> float:
    """Return 1 if the answer equals the gold answer. A number that is said in prose, without LaTeX, is read as `answer` reads it."""
    said = _PERCENT.sub("", said)
    if not any(mark in said for mark in _DELIMITERS) and gold_value(gold) is not None:
        if _PROSE.search(said) or (flexible(said) is not None and "!" not in said):
            return float(equal(flexible(said) or "", gold))
        said = _delimited(said.strip(" \t\n.?").replace("**", "^"))
    return float(_equal(expected, _parsed(said)))


def _delimited(text: str) -> str:
    return text if any(mark in text for mark in _DELIMITERS) else f"${text}$"


def _parsed(text: str) -> list[Any]:
    """Return the parsed expressions, [] if the text cannot be parsed: unparsed text must never be compared as text."""
    from math_verify import parse

    text = _REPEATING.sub(_as_fraction, text)
    try:
        found: list[Any] = parse(text, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # anything that the grammar, SymPy or regular expressions raise
        return []
    return found


def _with_imaginary_unit(expression: Any) -> Any:
    """Return the expression with the symbol i, which the parser takes for a variable, as the imaginary unit."""
    named = [symbol for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"]
    return expression.subs(dict.fromkeys(named, _parsed(r"$\sqrt{-1}$")[0])) if named else expression


def _as_fraction(found: re.Match[str]) -> str:
    """Return a repeating decimal as a fraction: 1.2\\overline{34} is (1234 - 12) / 990."""
    before = found["whole"] + found["once"]
    period = found["group"] or found["digit"] or f"{found['first']}{found['between']}{found['last']}"
    value = Fraction(int(before + period) - int(before), 10 ** len(found["once"]) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _equal(expected: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    try:
        if verify(expected, found, timeout_seconds=None, raise_on_error=True):
            return True
        complexes = [[_with_imaginary_unit(one) for one in side] for side in (expected, found)]
        return complexes != [expected, found] and bool(verify(*complexes, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # SymPy could not compare the two, so equality is not proven
        return False
