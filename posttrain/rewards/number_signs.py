"""Signs and separators of numbers in other scripts, and characters that are not seen, as ASCII writes them.

Example:
    >>> usual_signs("\\u0663\\u066b\\u0665"), usual_signs("\\uff11\\uff0c\\uff10\\uff10\\uff10"), usual_signs("-\\u200f7")
    ('٣.٥', '１,０００', '-7')
"""

from __future__ import annotations

import re
import unicodedata

_SEEN = (
    (re.compile(r"(?<=\d)\ufe0f?\u20e3"), ""),  # a digit as a key
    (re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe0e\ufe0f\ufeff]"), ""),
    (
        re.compile(r"(?<!\d)[\u00a0\u2007\u202f]|[\u00a0\u2007\u202f](?!\d)"),
        " ",
    ),  # between digits it separates thousands
)
_UPPER, _LOWER = "[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,9}", "[\u2080-\u2089]{1,9}"
_SMALL_FRACTION = re.compile(
    rf"({_UPPER}(?=[\u2044/]{_LOWER}|\u2044\d)|(?<!\d)\d{{1,9}}(?=\u2044{_LOWER}))[\u2044/]({_LOWER}|\d{{1,9}})"
)
"""A fraction of raised and lowered digits."""
_SIGNS = (
    (re.compile("[\u2010-\u2012\ufe58\ufe63]"), "-"),
    (re.compile(r"(?<=\d)[\u066b\uff0e](?=\d)"), "."),
    (re.compile(r"(?<=\d)\u066c(?=\d{3}(?!\d))"), ","),
    # between digits of usual width, a wide comma separates the entries of a list
    (re.compile("(?<=[\uff10-\uff19])\uff0c(?=[\uff10-\uff19]{3}(?![\uff10-\uff19]))"), ","),
    (re.compile(r"(?<=\d)[ \t]?[\u2044\u2215\uff0f][ \t]?(?=\d)"), "/"),
)
"""Patterns and their usual spelling. Without them, a number is read in two parts, and the last part may be a wrong answer's right one."""


def _spelt(found: re.Match[str]) -> str:
    """Return a fraction of small digits as ` 1/2`."""
    return f" {unicodedata.normalize('NFKC', found[1])}/{unicodedata.normalize('NFKC', found[2])}"


def seen(text: str) -> str:
    """Return the text without characters that are not seen, such as marks of direction, and with usual spaces between words."""
    if not text.isascii():
        for pattern, usual in _SEEN:
            text = pattern.sub(usual, text)
    return text


def usual_signs(text: str) -> str:
    """Return the text with the usual signs around digits of any script, and without characters that are not seen."""
    text = _SMALL_FRACTION.sub(_spelt, seen(text))
    for pattern, usual in _SIGNS:
        text = pattern.sub(usual, text)
    return text
