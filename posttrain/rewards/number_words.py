"""Read a number that is written in words, English or Chinese: twenty-one, one hundred and five, three quarters, 一百零五.

Only a text that is such a number, with a short noun at most, is read: `five apples`, but not `one of them`.

Example:
    >>> spelt_number("twenty-one."), spelt_number("three quarters"), spelt_number("one of them")
    ('21', '3/4', None)
"""

from __future__ import annotations

import re

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
_TEENS_AND_TENS = "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = [*range(16), 16, 17, 18, 19, 20, 30, 40, 50, 60, 70, 80, 90]
_SMALL = dict(zip(f"{_ONES} {_TEENS_AND_TENS}".split(" "), _VALUES, strict=True))
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fifth": 5, "fifths": 5}
_WORD = rf"(?:{'|'.join([*_SMALL, 'hundred', 'dozen', *_LARGE])})"
_ENGLISH = re.compile(
    rf"(?P<sign>(?:minus|negative)\s+)?(?P<number>(?:an?\s+(?=hundred|dozen|thousand|million|half|third|quarter|fifth))?"
    rf"(?:{_WORD}(?:(?:\s+and\s+|[\s-]+){_WORD}){{0,12}})?(?:[\s-]*\b(?P<part>{'|'.join(_PARTS)}))?)"
    r"(?:\s+(?!of\b|and\b|or\b|to\b|is\b|that\b|who\b|times\b|plus\b|minus\b|less\b|more\b|over\b)[a-z]{2,20}){0,2}",
    re.IGNORECASE,
)
_CHINESE_DIGITS = dict(zip("\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d", range(10), strict=True)) | {
    "\u3007": 0,
    "\u4e24": 2,
}
_CHINESE_TENS = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}
_CHINESE = re.compile(rf"(\u8d1f?)([{''.join([*_CHINESE_DIGITS, *_CHINESE_TENS])}\u4e07]{{1,16}})\w{{0,2}}")
_ENDS = " \t\n*_`\"'.,!;:()[]{}$\u3002\uff0c\uff01"


def spelt_number(text: str) -> str | None:
    """Return the digits of a short text that is a number in words, None if it is none."""
    text = text.strip(_ENDS).removeprefix("\\text{")
    if len(text) > 120:
        return None
    if found := _CHINESE.fullmatch(text):
        return _signed(found[1], _chinese(found[2]))
    found = _ENGLISH.fullmatch(text)
    if found is None or not found["number"]:
        return None
    words = [word for word in re.split(r"[\s-]+", found["number"].lower()) if word != "and"]
    bottom = _PARTS.get(words[-1]) if words else None
    value = _english([word for word in words if word not in _PARTS])
    if value is None:
        return None
    return _signed(found["sign"], str(value) if bottom is None else f"{value}/{bottom}")


def _signed(sign: str | None, digits: str | None) -> str | None:
    return f"-{digits}" if sign and digits else digits


def _english(words: list[str]) -> int | None:
    """Return the value of number words. None if they are no number, such as `two three`."""
    total, below, last = 0, 0, 100
    for word in words:
        if word in ("a", "an"):
            below = 1
        elif word in _SMALL:
            size = _SMALL[word]
            if last <= size or (size < 10 <= last < 20) or (size > 9 and last < 100):
                return None
            below, last = below + size, size
        elif word in ("hundred", "dozen"):
            below, last = max(below, 1) * (100 if word == "hundred" else 12), 100
        else:
            total, below, last = total + max(below, 1) * _LARGE[word], 0, 100
    return total + below if words else 1


def _chinese(text: str) -> str | None:
    """Return the digits of a Chinese number below a hundred million; None if its signs are in no order of one."""
    if not any(sign in _CHINESE_TENS or sign == "\u4e07" for sign in text):
        return "".join(str(_CHINESE_DIGITS[sign]) for sign in text)
    total, below, digit = 0, 0, 0
    for sign in text:
        if sign in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[sign]
        elif sign == "\u4e07":
            total, below, digit = (total + below + digit) * 10**4, 0, 0
        else:
            below, digit = below + max(digit, 1) * _CHINESE_TENS[sign], 0
    return str(total + below + digit)
