r"""Find and read the numbers of a text as people and models write them: 1,200, 3 1/2, 3 x 10^2, \frac{1}{2}, 2^{10}, ½, 3×10⁵, ４２.

Example:
    >>> [values("2,5 cm")[-1], number_value("2^{10}"), values(r"it is \sqrt{2}")]
    ['5', Fraction(1024, 1), []]
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from posttrain.environments.numbers import parse_number

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_TIMES_TEN = r"\s?(?:x|\u00d7|\\times|\\cdot|\u00b7|\*)\s?10\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?"
_SIGN = r"(?:(?<![A-Za-z0-9_)\]])[-+](?=[$\u20ac\u00a3\d.\\]))?"
_LATEX = r"\\[dt]?frac\s?(?:\{[-+]?\d{1,30}\}\s?\{\d{1,30}\}|\d\d)"
_POWER = r"\s?\^\s?(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3})"
_UNIT = r"(?:cm|mm|km|kg|mg|ml|lbs?|oz|ft|mph|hrs?|h|min)(?![A-Za-z0-9_])"
_HIDDEN = "\ue000"
"""Placeholder for an expression that is not read, such as a root."""
_VALUE = re.compile(
    rf"{_SIGN}(?:\d{{1,30}}\s?)?{_LATEX}"
    rf"|(?<![A-Za-z0-9_.,]){_SIGN}\d{{1,30}}\s\d{{1,30}}/\d{{1,30}}(?![A-Za-z0-9_/])"
    rf"|(?<![A-Za-z0-9_.^])(?<!\^[{{ +-]){_SIGN}[$\u20ac\u00a3]?[-+]?(?:{_DIGITS})"
    rf"(?:{_TIMES_TEN}|{_POWER}|[eE][-+]?\d{{1,3}}|/\d{{1,30}})?"
    rf"(?:(?={_UNIT})|(?![A-Za-z0-9_]|\.\d|,\d{{3}}(?!\d)|[)}}\]]*\s?\^))",
    re.ASCII,
)
_FRACTION = re.compile(r"([-+]?)(?:(\d+)\s?)?\\[dt]?frac\s?(?:\{([-+]?\d+)\}\s?\{(\d+)\}|(\d)(\d))")
_MIXED = re.compile(r"([-+]?)(\d+)\s(\d+)/(\d+)")
_SCIENTIFIC = re.compile(rf"(?P<digits>[-+]?[$\u20ac\u00a3]?[-+]?(?:{_DIGITS})){_TIMES_TEN}")
_RAISED = re.compile(r"(?P<sign>[-+]?)(?P<base>\d{1,12}(?:\.\d{1,12})?)\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?")
_OPERATOR = re.compile(
    r"\s?(?:[-+*/\u00d7\u00f7\u00b7^]|\\(?:times|cdot|div)\b)\s?[-+$\\({]*(?:[\d\ue000]|pi\b|\u03c0)"
    r"|\s?(?:\\pi\b|\u03c0|\ue000)|:\d\d\b"
)
"""After a number: it is a part of an expression, a date or a time."""
_CLEAN = (
    ("\u2212", "-"),
    ("\u2013", "-"),
    ("{,}", ","),
    ("\\,", ""),
    ("\\!", ""),
    ("\\$", "$"),
    ("\\%", "%"),
    ("\\left", ""),
    ("\\right", ""),
)
_THIN = re.compile(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))")
_DETACHED_MINUS = re.compile(r"((?:\bis|[=:])[ \t])-[ \t](?=[\d$.])")
_UNDERLINED = re.compile(r"(?<![A-Za-z0-9_])_{1,3}(?=[-+$.\d])|(?<=\d)_{1,3}(?![A-Za-z0-9_])")
_ROOT = re.compile(r"\\sqrt\s?(?:\[[^\[\]]{0,20}\])?\s?(?:\{[^{}]*\}|\d)|\u221a\s?\(?[\d.]+\)?")
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
_RAISED_DIGITS = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_FRACTION_SIGN = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,/]|\.\d{3})")


def cleaned(text: str) -> str:
    """Return the text with each spelling of digits, signs and separators replaced by the usual one."""
    for old, new in _CLEAN:
        text = text.replace(old, new)
    if not text.isascii():
        text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), _THIN.sub("", text))
        text = _RAISED_DIGITS.sub(lambda run: "^" + unicodedata.normalize("NFKC", run[0]).replace("\u2212", "-"), text)
        text = _FRACTION_SIGN.sub(_spelt_fraction, text)
    return _UNDERLINED.sub("", _DETACHED_MINUS.sub(r"\1-", _ROOT.sub(_HIDDEN, text)))


def values(text: str) -> list[str]:
    """Return the numbers of a text as they are written; exponents and the insides of roots are none."""
    return [found[0] for found in _VALUE.finditer(cleaned(text))]


def result_of(text: str) -> str | None:
    """Return the number that a short text such as `6 * 7 = 42 apples` comes to.

    None if it holds none, or only expressions that would need to be computed, such as `6 * 7`.
    """
    text = _SPACED.sub(lambda found: found[0].replace(" ", ""), cleaned(text))
    for side in reversed(text.split("=")):
        found = _VALUE.search(side)
        if found and not _OPERATOR.match(side, found.end()) and _HIDDEN not in side[: found.start()]:
            return found[0]
    return None


def mentions_numbers(text: str) -> bool:
    """Return True if the text has a digit or an expression that is not read."""
    return re.search(rf"[\d{_HIDDEN}]", cleaned(text)) is not None


def number_value(text: str) -> Fraction | None:
    r"""Return the value of one number, also 3 1/2, 3 x 10^2, 2^{10} and \frac{1}{2}; None if it is none."""
    text = cleaned(text).strip().strip("*_$ ").rstrip(".")
    if found := _FRACTION.fullmatch(text):
        top, bottom = int(found[3] or found[5]), int(found[4] or found[6])
        return None if found[2] and top < 0 else _ratio(found[1], int(found[2] or 0), top, bottom)
    if found := _MIXED.fullmatch(text):
        return _ratio(found[1], int(found[2]), int(found[3]), int(found[4]))
    if found := _SCIENTIFIC.fullmatch(text):
        digits = parse_number(found["digits"])
        return None if digits is None else digits * Fraction(10) ** int(found["power"])
    if found := _RAISED.fullmatch(text):
        base, power = Fraction(found["base"]), int(found["power"])
        value = None if not base and power < 0 else base**power
        return -value if value is not None and found["sign"] == "-" else value
    return parse_number(text)


def _spelt_fraction(found: re.Match[str]) -> str:
    ratio = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {ratio}" if found[1] else ratio


def _ratio(sign: str, whole: int, top: int, bottom: int) -> Fraction | None:
    if not bottom:
        return None
    value = whole + Fraction(top, bottom)
    return -value if sign == "-" else value
