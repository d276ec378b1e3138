"""Parse numbers as people write them, exactly: 1,200 = 1200 = 1200.0 = $1,200.

Example:
    >>> parse_number("$1,200.50"), parse_number("2/4"), parse_number("twelve")
    (Fraction(2401, 2), Fraction(1, 2), None)
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = (
    rf"[-+\u2212]?\s?[$€£]?\s?[-+\u2212]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}|/[0-9]+)?\s?%?"
)
"""A regular expression without groups for candidates; `parse_number` makes the decision."""

_PARTS = re.compile(
    rf"(?P<sign>[-+]?)\s?[$€£]?\s?(?P<inner>[-+]?)(?P<digits>{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:(?P<exponent>[eE][-+]?[0-9]{1,3})|/(?P<divisor>[0-9]+))?\s?%?"
)
_LONGEST = 200
"""Characters; longer digit strings never reach exact arithmetic, where they would be slow."""


def parse_number(text: str) -> Fraction | None:
    """Return the exact value of a text that is one number, or None. Percent and currency signs are ignored: 50% is 50."""
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
