"""Read the words that multiply a number: 1.5 million, 2 dozen, 3万5千.

Example:
    >>> scaled("1.5 million"), scaled("3万5千"), scaled("42")
    ([('1.5', 1000000)], [('3', 10000), ('5', 1000)], [])
"""

from __future__ import annotations

import re

_ENGLISH = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_EUROPEAN = {
    "tausend": 10**3, "millionen": 10**6, "milliarde": 10**9, "milliarden": 10**9, "billionen": 10**12,
    "mille": 10**3, "milliard": 10**9, "milliards": 10**9, "mill\u00f3n": 10**6, "millones": 10**6, "billones": 10**12,
    "milione": 10**6, "milioni": 10**6, "miliardo": 10**9, "miliardi": 10**9, "milh\u00e3o": 10**6, "milh\u00f5es": 10**6,
    "mln": 10**6, "mio": 10**6, "mrd": 10**9, "bn": 10**9,
}  # fmt: skip
_OTHER = {
    "lakh": 10**5, "crore": 10**7, "\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8, "\u5104": 10**8, "\u5343": 10**3, "\u767e": 100,
    "\ub9cc": 10**4, "\uc5b5": 10**8, "\u0442\u044b\u0441\u044f\u0447": 10**3, "\u043c\u0438\u043b\u043b\u0438\u043e\u043d": 10**6,
    "\u043c\u0438\u043b\u043b\u0438\u0430\u0440\u0434": 10**9,
}  # fmt: skip
SCALES = _ENGLISH | _EUROPEAN | _OTHER
"""Value of each word. Words with two meanings, such as `mil` or French `billion`, have the English one or none."""
_LATIN = "|".join(sorted((word for word in (*_ENGLISH, *_EUROPEAN, "lakh", "crore")), key=len, reverse=True))
_CYRILLIC = "|".join(word for word in _OTHER if "\u0400" <= word[0] <= "\u04ff")
SCALE = (
    rf"(?:(?:{_LATIN})s?(?![A-Za-z\u00c0-\u024f])|(?:{_CYRILLIC})[\u0400-\u04ff]{{0,2}}(?![\u0400-\u04ff])"
    r"|[\u4e07\u842c\u4ebf\u5104\ub9cc\uc5b5]|\u5343(?![\u514b\u7c73\u74e6\u5361\u5e15\u7126\u8d6b\u5b57])|\u767e(?!\u5206))"
)
"""One scale word. The signs for thousand and hundred are none in units (kilogram) and in `percent`."""
_TAIL = rf"(?:[ \t\u00a0-]?(?i:{SCALE})){{1,3}}"
_PLAIN = r"\d{1,15}(?:\.\d{1,15})?"
SCALED = rf"{_TAIL}(?:\s?(?:and\s)?{_PLAIN}{_TAIL}){{0,3}}(?:(?<=[\u4e07\u842c\u4ebf\u5104\u5343])\d{{1,4}}(?![\d.,]))?"
"""What may follow a number: scale words, and smaller parts such as those of 1 million 200 thousand or 3万5000."""
_PART = re.compile(rf"(?P<number>.*?\S)(?P<scales>{_TAIL})(?:\s?and\s)?\s?", re.DOTALL)
_WORD = re.compile(SCALE, re.IGNORECASE)


def scaled(text: str) -> list[tuple[str, int]]:
    """Return the parts of a number with scale words, each with its factor; empty if it has no such word."""
    parts, place = list[tuple[str, int]](), 0
    while found := _PART.match(text, place):
        factor = 1
        for word in _WORD.findall(found["scales"]):
            factor *= _factor(word.lower())
        parts.append((found["number"].strip(), factor))
        place = found.end()
    if not parts or not (rest := text[place:]).strip():
        return parts
    # in Chinese, 3\u4e075 is short for 3\u4e075\u5343
    short = len(rest) == 1 and text[place - 1] in "\u4e07\u842c\u4ebf\u5104\u5343"
    return [*parts, (rest, parts[-1][1] // 10 if short else 1)]


def _factor(word: str) -> int:
    """Return the value of a scale word in any of its forms."""
    return max(value for name, value in SCALES.items() if word in (name, f"{name}s") or _inflected(word, name))


def _inflected(word: str, name: str) -> bool:
    """Return True for the Russian forms of a word, such as those of thousand."""
    return "\u0400" <= name[0] <= "\u04ff" and word.startswith(name)
