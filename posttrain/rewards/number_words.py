"""Read a number that is written in words, English or Chinese: twenty-one, one hundred and five, three quarters, 一百零五.

Only a text that is such a number, with a short noun at most, is read: `five apples`, but not `one of them`.

Example:
    >>> spelt_number("twenty-one."), spelt_number("three quarters"), spelt_number("one of them")
    ('21', '3/4', None)
"""

from __future__ import annotations

import re

from posttrain.rewards.chinese import chinese_number
from posttrain.rewards.expressions import ORDINALS

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
_TEENS_AND_TENS = "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = [*range(16), 16, 17, 18, 19, 20, 30, 40, 50, 60, 70, 80, 90]
_SMALL: dict[str, int] = dict(zip(f"{_ONES} {_TEENS_AND_TENS}".split(" "), _VALUES, strict=True))
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5, "crore": 10**7}
_PART = {"half": 2, "quarter": 4} | ORDINALS
_PARTS = _PART | {f"{name}s": value for name, value in _PART.items()} | {"halves": 2}
_PART_WORD = "|".join(sorted(_PARTS, key=len, reverse=True))
_WORD = rf"(?:{'|'.join([*_SMALL, 'hundred', 'dozen', *_LARGE])})"
_ONE = "|".join(_ONES.split(" ")[:10])
_NO_NOUN = (
    "of|and|or|to|is|that|who|times|plus|minus|less|more|over|point"
    "|squared|cubed|factorial|pi|choose|divided|multiplied|out|than|am|pm|first|below"
    f"|{'|'.join(_SMALL)}"
)
"""Words after a number that make it a part of an expression or a time."""
_SCALE = "|".join(("hundred", "dozen", *_LARGE))
_ENGLISH = re.compile(
    rf"(?P<sign>(?:minus|negative)\s+)?(?P<number>(?:an?\s+(?=hundred|dozen|thousand|million|{_PART_WORD}))?"
    rf"(?:\b{_WORD}\b(?:(?:\s+and\s+(?!(?:{_ONE})[\s-]+(?:{_PART_WORD})\b)|[\s-]+){_WORD}\b){{0,12}})?)(?P<decimals>(?:\s+point)(?:[\s-]+(?:{_ONE})\b){{1,12}})?"
    rf"(?:(?P<mixed>\s+and\s+)(?P<some>an?|{_ONE})[\s-]+|[\s-]*)(?P<part>\b(?:{_PART_WORD})\b)?"
    rf"(?P<scale>\s+(?:{_SCALE}))?(?:\s+(?!(?:{_NO_NOUN}|{_PART_WORD}|{_SCALE})\b)[a-z]{{2,20}}){{0,2}}",
    re.IGNORECASE,
)
_ENDS = " \t\n*_`\"'.,!;:()[]{}$\u3002\uff0c\uff01"


def spelt_number(text: str) -> str | None:
    """Return the digits of a short text that is a number in words, None if it is none."""
    text = text.strip(_ENDS).removeprefix("\\text{")
    if len(text) > 120:
        return None
    if not text.isascii() and (digits := chinese_number(text)) is not None:
        return digits
    found = _ENGLISH.fullmatch(text)
    read = _read(found) if found else None
    return None if found is None or read is None else _signed(found["sign"], read + (found["scale"] or ""))


def _read(found: re.Match[str]) -> str | None:
    """Return the digits of a number in English: whole, 7.5, 7/8 or 7 1/2."""
    words = [word for word in re.split(r"[\s-]+", found["number"].lower()) if word not in ("and", "")]
    part = (found["part"] or "").lower()
    value = _english(words)
    if value is None or not (words or part == "half") or bool(found["mixed"]) > bool(part):
        return None
    if found["decimals"]:
        digits = "".join(str(_SMALL[word]) for word in re.split(r"[\s-]+", found["decimals"].lower().strip())[1:])
        return None if part else f"{value}.{digits}"
    if not part:
        return str(value)
    above = 1 if found["mixed"] and found["some"].lower() in ("a", "an") else value
    above = _SMALL.get((found["some"] or "").lower(), above) if found["mixed"] else above
    if above != 1 and part in _PART:
        return None  # an ordinal: twenty-fifth
    return f"{value} {above}/{_PARTS[part]}" if found["mixed"] else f"{above}/{_PARTS[part]}"


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
