"""Numbers as people write them, read exactly: 1,200 = 1200 = 1200.0 = $1,200."""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = (
    rf"[-+\u2212]?\s?[$€£]?\s?[-+\u2212]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}|/[0-9]+)?\s?%?"
)
"""A regular expression (no groups) for what `parse_number` may read; it decides itself."""

_PARTS = re.compile(
    rf"(?P<sign>[-+]?)\s?[$€£]?\s?(?P<inner>[-+]?)(?P<digits>{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:(?P<exponent>[eE][-+]?[0-9]{1,3})|/(?P<divisor>[0-9]+))?\s?%?"
)
_LONGEST = 200
"""Characters; keeps hostile digit strings away from exact arithmetic."""


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, or None. A percent or currency sign is read over: 50% is 50."""
    text = text.strip().replace("\u2212", "-")
    found = _PARTS.fullmatch(text) if len(text) <= _LONGEST else None
    if found is None or (found["sign"] and found["inner"]):
        return None
    value = Fraction(found["digits"].replace(",", "").rstrip(".") + (found["exponent"] or ""))
    if found["divisor"]:
        if not int(found["divisor"]):
            return None
        value /= int(found["divisor"])
    return -value if "-" in (found["sign"], found["inner"]) else value
