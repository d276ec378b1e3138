r"""Find and read the numbers of a text as people and models write them: 1,200, 3 1/2, 3 x 10^2, \frac{1}{2}, 2^{10}, ½, 3×10⁵, ４２.

Example:
    >>> [values("2 or 5 cm")[-1], number_value("2^{10}"), values(r"it is \sqrt{2}")]
    ['5', Fraction(1024, 1), []]
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache

from posttrain.environments.numbers import parse_number
from posttrain.rewards import chinese
from posttrain.rewards.assertions import ends, leads
from posttrain.rewards.expressions import COMMAND, DATE_AFTER, DATE_BEFORE, HIDDEN, without_expressions
from posttrain.rewards.number_signs import usual_signs
from posttrain.rewards.scales import SCALE, SCALED, scaled

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_EXPONENT = r"[-+]?\d{1,3}"
_TIMES_TEN = r"\s?(?:x|\u00d7|\\times|\\cdot|\u00b7|\*)\s?10\s?\^\s?\{?"
_SIGN = r"(?:(?<![A-Za-z0-9_)\]])[-+](?=[$\u20ac\u00a3\d.\\]))?"
_LATEX = r"\\[dt]?frac\s?(?:\{[-+]?\d{1,30}\}\s?\{\d{1,30}\}|\d\d)"
_POWER = r"\s?\^\s?(?:\{[-+]?\d{1,3}\}|[-+]?\d{1,3})"
_UNIT = r"(?:cm|c(?![.\w])|mm|km|kg|mg|ml|mL|L|lbs?|oz|ft|mph|hrs?|h|min|[ap]m|kWh?|Hz|[kMGT]B|c?m[23])(?![A-Za-z0-9_])"
_UNCLEAR = "\ue002"
"""Placeholder for digits with more than one reading: 2,5 is a decimal in some languages and a list in others."""
_NUMBER = (
    rf"{_SIGN}(?:\d{{1,30}}\s?)?{_LATEX}"
    rf"|(?<![A-Za-z0-9_.,]){_SIGN}\d{{1,30}}\s\d{{1,30}}/\d{{1,30}}(?![A-Za-z0-9_/])"
    rf"|(?<![A-Za-z0-9_.^])(?<!\^[{{ +-]){_SIGN}[$\u20ac\u00a3]?[-+]?(?:{_DIGITS})"
    rf"(?:{_TIMES_TEN}{_EXPONENT}\}}?|{_POWER}|[eE][-+]?\d{{1,3}}|/\d{{1,30}})?"
    rf"(?:(?={_UNIT})|(?=(?i:{SCALE}))|(?![A-Za-z0-9_]|\.\d|,\d{{3}}(?!\d)|[)}}\]]*\s?\^))"
)
_VALUE = re.compile(rf"(?:{_NUMBER})(?:{SCALED})?|{_UNCLEAR}", re.ASCII)
_FRACTION = re.compile(r"([-+]?)(?:(\d+)\s?)?\\[dt]?frac\s?(?:\{([-+]?\d+)\}\s?\{(\d+)\}|(\d)(\d))")
_MIXED = re.compile(r"([-+]?)(\d+)\s(\d+)/(\d+)")
_SCIENTIFIC = re.compile(rf"(?P<digits>[-+]?[$\u20ac\u00a3]?[-+]?(?:{_DIGITS})){_TIMES_TEN}(?P<power>{_EXPONENT})\}}?")
_RAISED = re.compile(
    r"(?P<sign>[-+]?)(?P<base>\d{1,12}(?:\.\d{1,12})?|\.\d{1,12})\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?"
)
_LARGER_UNIT = (
    r"years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|feet|foot|ft|['\u2019\u2032]|pounds?|lbs?|dollars?|met(?:er|re)s?|m|km|kg"
    r"|kilomet(?:er|re)s?|kilograms?"
)
_SMALLER_UNIT = (
    r"\s?(?:months?|weeks?|days?|hours?|minutes?|mins?|seconds?|secs?|s|inch(?:es)?|in|[\"\u201d\u2033]|ounces?|oz|cents?|met(?:er|re)s?|m|cm"
    r"|centimet(?:er|re)s?|grams?|g)(?![A-Za-z])"
)
_OPERATOR = re.compile(
    r"\s?(?:[-+*/\u00d7\u00f7\u00b7^]|\\(?:times|cdot|div)\b)\s?[-+$\\({]*(?:[\d\ue000]|pi\b|\u03c0)"
    r"|\s?(?:\\?[pP]i\b|\u03c0|\ue000)|[ \t]?[xX](?=[ \t]?\d)|[ \t](?:[xz]|y(?!\s?\d)|i(?!\s\w))\b|(?<=\})[A-Za-z](?![A-Za-z])"
    r"|\s?(?:[-+*\u00d7\u00b7]|\\(?:times|cdot)\b)\s?(?:[b-hj-zB-HJ-Z]|[aAiI](?!\s[a-z]))(?![A-Za-z'\u2019.)])|,\s?\\[lc]?dots|:\d\d\b|\s?mil\b"
    r"|[\u2080-\u2089\u2044]|\s?\u00b0\s?\d{1,2}\s?['\u2032]"
    r"|[\s)]*(?:\.{2,}|\u2026|\|)\s?\d|\u2014\d|\s?%\s?\d|:\d|\s:\s?\d|\s?[A-Za-z]\(|/[knxyz]\b|[ \t]?(?:st|nd|rd|th)\b"
    rf"|{DATE_AFTER}|[\s{{}})%]*{COMMAND}"
    r"|\s(?:less|fewer|more|greater)\sthan\s(?:[$\u20ac\u00a3]?\d|[xyz]\b)"
    rf"|\s?(?i:[ap]\.?m\b)(?!\sI\b)|\s?o\s?['\u2019]\s?clock\b|\s?(?:{chinese.AFTER})"
    rf"|\s?{chinese.LARGER_UNIT}\s?\d{{1,4}}(?:\.\d{{1,4}})?{chinese.SMALLER_UNIT}"
    rf"|\s?(?:{_LARGER_UNIT})[.,]?\s?(?:and\s)?\d{{1,4}}(?:\.\d{{1,4}})?{_SMALLER_UNIT}"
)
"""After a number: it is a part of an expression, a date, a time, in two units, or in units of `mil`, which has several meanings."""
_DENIED = re.compile(
    r"(?:\b(?:not|cannot|never|hardly|scarcely|no(?=\slonger\b)|nicht|pas|non|(?:anything|everything|all) (?:but|except)"
    r"|rather than|instead of|other than)\b"
    r"|n['\u2019]t\b|\u043d\u0435\b|(?<!\u662f)\u4e0d(?:\u662f|\u4e3a|\u7b49\u4e8e)|\u5e76\u975e)"
    rf"(?:\s(?:be|been|equal to|exactly|just|only|simply|really|about|longer|necessarily|known to be)){{0,2}}[ \t:*_]*"
    rf"(?:{_NUMBER})(?:{SCALED})?(?:\s(?:n?or|oder|ou|ni)\s(?:{_NUMBER})(?:{SCALED})?)*"
    rf"|(?:{_NUMBER})(?:{SCALED})?\s(?:(?:is|was|must be|would be|seems|looks)\s(?:wrong|incorrect|false"
    r"|not\s(?:the|an?|right|correct|it)\b)|(?:isn|wasn)['\u2019]t\s(?:the|an?|right|correct|it)\b|(?:cannot|can['\u2019]t)\sbe\b)[^\n.;,]{0,40}",
    re.ASCII | re.IGNORECASE,
)
"""Numbers that the text denies: the 42 of `not 42, but 43` and of `42 is wrong`, the 3 and 4 of `not 3 or 4`."""
_BOUND_BEFORE = re.compile(
    rf"\b(?:at (?:most|least)|up to)\s(?:{_NUMBER})(?:{SCALED})?[^\n.;,\d]{{0,20}}[,;]?\s(?:so|hence|therefore|thus)\b(?=[^\n]*\d)",
    re.ASCII | re.IGNORECASE,
)
"""A bound that the answer follows from: the `at most 7` of `at most 7, so 6`."""
_UNIT_BETWEEN = r"[*_)%\s]*(?:[A-Za-z]{1,12}[*_,]*\s)?"
_OPEN = r"[*_(\s$\u20ac\u00a3]*"
_OR = re.compile(rf"{_UNIT_BETWEEN}(?:\b(?:or|oder|ou)\b|~|\uff5e|\u6216\u8005?)\s?(?:[A-Za-z]{{1,3}}\s?=)?{_OPEN}")
_TO = re.compile(rf"{_UNIT_BETWEEN}(?:\b(?:to|through|bis)\b|\u5230|\u81f3){_OPEN}")
_AND = re.compile(rf"{_UNIT_BETWEEN}(?:\b(?:and|to|und|et|y)\b|-|[\u548c\u4e0e\u5230\u81f3]){_OPEN}")
_BETWEEN = re.compile(r"(?:\b(?:between|zwischen|entre)|\u4ecb\u4e8e|\u5728)[*_(\s$\u20ac\u00a3]*$", re.IGNORECASE)
_MORE = re.compile(rf"{_UNIT_BETWEEN}(?:[,;&\u3001\u548c\u4e0e\u6216]|,?\s?\b(?:and|or)\b)\s?{_OPEN}\d")
"""After a number of a list: one more."""
_LISTED = re.compile(rf"{_UNIT_BETWEEN}(?:[,;&\u3001\u548c\u4e0e]|,?\s?\band\b)\s?{_OPEN}")
_END = re.compile(r"[^\w\n]*(?:\n|$)")
_LARGER = re.compile(
    rf"\s?(?:{_LARGER_UNIT})[.,]?\s?(?:and\s)?|\s?{chinese.LARGER_UNIT}\s?"
    r"|,?\s?(?:with\s)?(?:an?\s)?(?:remainder|rest|[rR])\.?\s?(?:of\s|is\s)?"
)
_SMALLER = re.compile(rf"{_SMALLER_UNIT}|\s?{chinese.SMALLER_UNIT}")
"""`5 hours 30 minutes` and `3 remainder 1` are one quantity in two numbers."""
_DOLLARS = re.compile(r"\$?\s?(?:dollars?|euros?)?,?\s?(?:and\s)?\$?")
_CENTS = re.compile(r"\$?\s?cents?\b")
_OF_ALL = re.compile(r"\s(?:(?:out\s)?of|in|per)\s(?:the\s|every\s|each\s)?")
"""Between two numbers: the first one counts some of the second."""
_OF_BOTH = re.compile(r"\s(?:times|plus|over|divided by|multiplied by)\s")
"""Between two numbers: the second one is a part of an expression in words."""
_REMAINDER = re.compile(r"remainder|rest|[rR]\b")
_FROM = re.compile(r"\bfrom[*_(\s$\u20ac\u00a3]*$", re.IGNORECASE)
_BOUND = re.compile(
    rf"{chinese.BOUND}|"
    r"(?<!not )(?<!no )\b(?:less|more|greater|fewer|larger|smaller|higher|lower) than [$\u20ac\u00a3]?$"
    r"|(?:[<>\u2260\u2264\u2265\u00b1\u2213]|\\(?:leq?|geq?|neq?|leqslant|geqslant|lt|gt|pm|mp)(?![A-Za-z]))[ \t$({\\]*$"
)
_BOUNDED = re.compile(
    r"[ \t]?\+(?=[ \t]*(?:[.,;)*$\n]|\Z|[A-Za-z]{2}))"
    r"|[ \t$)}]*(?:[<>\u2260\u2264\u2265\u00b1]|\\(?:leq?|geq?|neq?|leqslant|geqslant|lt|gt|pm|mp)(?![A-Za-z]))"
    r"|(?:\s[A-Za-z]{1,12})?\s{1,3}(?:or\s(?:more|less|fewer|greater|higher|lower|above|below|over|under|up|larger|smaller)|and\s(?:above|up|over))\b"
)
"""Before and after a number: it bounds the answer (x < 5), or means two (\u00b15)."""
_OPERAND = re.compile(
    r"(?:\d[ \t]?%?|[)\]}]|(?<![A-Za-z])[A-Za-z]|\bpi|\u03c0|\ue000)[ \t]?"
    r"(?:(?<![*])[*](?![*])|[-+/\u00d7\u00f7\u00b7^]|\\(?:times|cdot|div)|(?<=\d)[ \t]?x|(?<=\d):|(?<=\d ):|(?<=\d)\u2014)[ \t]?[$\\({]*$"
    rf"|{DATE_BEFORE}|{COMMAND}[\s{{]*$|_\{{\s?$|{chinese.BEFORE}"
)
"""Before a number: it is the second part of an expression, a date or a time."""
_SIGNED_PART = re.compile(r"[\d)][ \t]?$")
_PRECISION = re.compile(r"[\s-]*(?:decimal|significant|places?|digits?|figures?|d\.?p\b|s\.?f\b)", re.IGNORECASE)
_OTHER_SOLUTION = re.compile(r"\bor\s+\S{1,6}\s*$|\d\s?(?:[,;]|,?\sand)\s?[A-Za-z]\S{0,5}\s*$")
_CLEAN = (
    ("\u2212", "-"),
    ("\u2013", "-"),
    ("\uff0d", "-"),
    ("{,}", ","),
    ("{:}", ":"),
    ("\\,", ""),
    ("\\!", ""),
    ("\\$", "$"),
    ("\\%", "%"),
    ("\\left", ""),
    ("\\right", ""),
)
_TEXT = r"[ ]?\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{[ ]?([^{}]*?)[ ]?\}"
_SPELLINGS = (
    (re.compile(r"</?[A-Za-z][^<>\n]{0,40}>"), " "),
    (
        re.compile(
            r"(?:(?<![A-Za-z])(?:(?:US|CA|AU|NZ|HK|[ACR])\$|(?:Rs|INR|USD|EUR|GBP|CHF|CNY|JPY|RMB)\b\.?)"
            r"|[\u00a5\u20a9-\u20ab\u20ad-\u20c0\uffe5])[ \t]?(?=\d)"
        ),
        "$",
    ),
    (re.compile(r"(?<![-=])[-=]{1,10}>"), "\u2192"),
    (re.compile(r">="), "\u2265"),
    (re.compile(r"<="), "\u2264"),
    (re.compile(r"!="), "\u2260"),
    (re.compile(r"\+/-"), "\u00b1"),
    (re.compile(r"\\math(?:rm|bf|it|sf|bb)\s?\{[eijkdxyzn]\}"), HIDDEN),
    (re.compile(_TEXT + r"[ ]?(?=[A-Za-z0-9])"), r" \1 "),
    (re.compile(_TEXT), r" \1"),
    (re.compile(r"\\[hv]?phantom\s*\{[^{}]{0,40}\}"), ""),
    (re.compile(r"(?<=\d)\\[ ;:](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(\\[dtc]?frac)\s?\{\s?([-+]?\d{1,30})\s?\}\s?\{\s?(\d{1,30})\s?\}"), r"\1{\2}{\3}"),
    (re.compile(r"\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ)\s?(?=\d{1,2}\s?['\u2032])"), "\u00b0 "),
    (re.compile(r"(?<=\d)\*\*(?=-?\d)"), "^"),
    (re.compile(r"\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ\b)|\\degree\b"), " "),
    (re.compile(r"(?<=\d)['\u2019_](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d)k(?![A-Za-z0-9])"), " thousand"),
    (re.compile(r"([$\u20ac\u00a3]\s?\d[\d.,]{0,20})K(?![A-Za-z0-9])"), r"\1 thousand"),
    (re.compile(r"\b(?:minus|negative)[ \t]+(?=[$\u20ac\u00a3]?\d)", re.IGNORECASE), "-"),
)
_SPACED_WITH_COMMA = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+,\d+(?!\d)")
_COMMAS = re.compile(r"(?<![\d,.])\d+(?:,\d+)+(?!\d)")
_GROUPS = re.compile(r"\d{1,3}(?:,\d{3})+")
_INDIAN = re.compile(r"\d{1,2}(?:,\d{2})+,\d{3}")
_THIN = re.compile(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))")
_DETACHED_MINUS = re.compile(r"((?:\bis|[=:])[ \t])-[ \t](?=[\d$.])")
_UNDERLINED = re.compile(r"(?<![A-Za-z0-9_])_{1,3}(?=[-+$.\d])|(?<=\d)_{1,3}(?![A-Za-z0-9_{])")
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
_RAISED_DIGITS = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_FRACTION_SIGN = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_LISTED_AT = re.compile(r"^[ \t]*(\d{1,3})[.)][ \t]+(?=\S)", re.MULTILINE)
_STEP = re.compile(r"^[ \t#*]*(?:step|case|part)[ \t]\d{1,3}[:.)]", re.MULTILINE | re.IGNORECASE)
_QUOTED = re.compile(r"^[ \t]*>[ \t]?", re.MULTILINE)
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,/]|\.\d{3})")


@lru_cache(128)
def cleaned(text: str) -> str:
    """Return the text with each spelling of digits, signs and separators replaced by the usual one.

    A judge asks for the same text up to six times; each time takes fifty passes over it.
    """
    for old, new in _CLEAN:
        text = text.replace(old, new)
    if not text.isascii():
        text = _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), _THIN.sub("", usual_signs(text)))
        text = _RAISED_DIGITS.sub(lambda run: "^" + unicodedata.normalize("NFKC", run[0]).replace("\u2212", "-"), text)
        text = _FRACTION_SIGN.sub(_spelt_fraction, text)
    for pattern, usual in _SPELLINGS:
        text = pattern.sub(usual, text)
    text = _COMMAS.sub(_grouped, _SPACED_WITH_COMMA.sub(_UNCLEAR, without_expressions(text)))
    return _UNDERLINED.sub("", _DETACHED_MINUS.sub(r"\1-", text))


def values(text: str) -> list[str]:
    """Return the numbers of a text as they are written; exponents and the insides of roots are none."""
    return [found[0] for found in _VALUE.finditer(cleaned(text))]


def result_of(text: str, whole: bool = False) -> str | None:
    """Return the number that a short text such as `6 * 7 = 42 apples` comes to.

    None if it holds none, only expressions that would need to be computed, such as `6 * 7`, or several: a range, or `3 or 4`.

    Args:
        whole: also None unless the words around the number are understood.
    """
    text = _prepared(text)
    sides = text.split("=")
    if any(_OTHER_SOLUTION.search(side) for side in sides[:-1]):
        return None
    for side in reversed(sides):
        found = _VALUE.search(side)
        if found and not _is_partial(side, found) and HIDDEN not in side[: found.start()]:
            after = _VALUE.search(side, found.end())
            lead, rest = side[: found.start()], side[found.end() :]
            if lead.endswith("'"):
                rest = rest.removeprefix("'")
            if whole and not (leads(lead) and ends(rest)):
                return None
            return None if after and _are_several(side, found, after, (_OR, _TO)) else found[0]
    return None


def last_of(text: str) -> str | None:
    """Return the last number of a text, None if there is none or if it is one of several: `between 3 and 5`, `3 or 4`."""
    text = _without_labels(_QUOTED.sub("", _prepared(text)))
    before: re.Match[str] | None = None
    last: re.Match[str] | None = None
    for found in _VALUE.finditer(text):
        before, last = last, found
    if before and last and _counts_some_of(text, before, last):
        return before[0]
    joining = (
        (_OR, _OF_BOTH)
        if before and _FROM.search(text[max(0, before.start() - 20) : before.start()])
        else (_OR, _OF_BOTH, _TO)
    )
    if last is None or (before and _are_several(text, before, last, joining)):
        return None
    if not _is_partial(text, last):
        return last[0]
    line = text[text.rfind("\n", 0, last.start()) + 1 :].split("\n", maxsplit=1)[0]
    return result_of(line) if "=" in line else None


def _counts_some_of(text: str, before: re.Match[str], last: re.Match[str]) -> bool:
    """Return True for the two numbers of `7 out of 10`, but not of `number 7 of 10`."""
    of = _OF_ALL.fullmatch(text[before.end() : last.start()])
    return bool(of) and text[before.start() - 1 : before.start()] != "#" and not _is_partial(text, before)


def _without_labels(text: str) -> str:
    """Return the text without the numbers of its steps, and of a list that counts from 1."""
    numbers = {found[1] for found in _LISTED_AT.finditer(text)}
    return _STEP.sub(" ", _LISTED_AT.sub(" ", text) if {"1", "2"} <= numbers else text)


def _prepared(text: str) -> str:
    return _SPACED.sub(lambda found: found[0].replace(" ", ""), undenied(cleaned(text)))


def _is_partial(text: str, found: re.Match[str]) -> bool:
    """Return True if a number is not the whole answer: a part of an expression or date, a bound, or unclear."""
    lead = text[max(0, found.start() - 24) : found.start()]
    signed = found[0][0] in "+-" and _SIGNED_PART.search(lead)
    inside = _OPERATOR.match(text, found.end()) or _OPERAND.search(lead) or signed
    return bool(inside or _BOUND.search(lead) or _BOUNDED.match(text, found.end()) or found[0] == _UNCLEAR)


def undenied(text: str) -> str:
    """Return the text without the numbers that it denies, or from which it infers the answer."""
    return _DENIED.sub(" ", _BOUND_BEFORE.sub(" ", text))


def _are_several(text: str, one: re.Match[str], other: re.Match[str], between: Iterable[re.Pattern[str]]) -> bool:
    """Return True if two neighbouring numbers are alternatives or a range, and differ."""
    gap, lead = text[one.end() : other.start()], text[max(0, one.start() - 20) : one.start()]
    joined = any(pattern.fullmatch(gap) for pattern in between) or bool(_BETWEEN.search(lead) and _AND.fullmatch(gap))
    joined |= bool(_LISTED.fullmatch(gap) and (_END.match(text, other.end()) or _MORE.match(text, other.end())))
    joined |= bool(_DOLLARS.fullmatch(gap) and _CENTS.match(text, other.end()))
    joined |= bool(_LARGER.fullmatch(gap) and (_SMALLER.match(text, other.end()) or _REMAINDER.search(gap)))
    if not joined or _PRECISION.match(text, other.end()):
        return False
    return number_value(one[0]) != number_value(other[0])


def mentions_numbers(text: str) -> bool:
    """Return True if the text has a digit or an expression that is not read."""
    return re.search(rf"[\d{HIDDEN}{_UNCLEAR}]", cleaned(text)) is not None


def number_value(text: str) -> Fraction | None:
    r"""Return the value of one number, also 3 1/2, 3 x 10^2, 2^{10}, \frac{1}{2} and 1.5 million; None if it is none."""
    text = cleaned(text).strip().strip("*_$ ").rstrip(".")
    if parts := scaled(text):
        return _sum_of(parts)
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


def unscaled_value(text: str) -> Fraction | None:
    """Return the 1.5 of `1.5 million`; None without a scale word or with several parts."""
    parts = scaled(cleaned(text).strip())
    return number_value(parts[0][0]) if len(parts) == 1 else None


def _sum_of(parts: list[tuple[str, int]]) -> Fraction | None:
    """Return the value of parts with falling factors, as in 1 million 200 thousand; after a larger factor, counting begins anew."""
    total, last = Fraction(0), 0
    for text, factor in parts:
        value = number_value(text)
        if value is None:
            return None
        value *= factor
        if factor >= last:
            total = value
        else:
            total += -value if total < 0 else value
        last = factor
    return total


def _grouped(found: re.Match[str]) -> str:
    if _GROUPS.fullmatch(found[0]):
        return found[0]
    return found[0].replace(",", "") if _INDIAN.fullmatch(found[0]) else _UNCLEAR


def _spelt_fraction(found: re.Match[str]) -> str:
    ratio = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {ratio}" if found[1] else ratio


def _ratio(sign: str, whole: int, top: int, bottom: int) -> Fraction | None:
    if not bottom:
        return None
    value = whole + Fraction(top, bottom)
    return -value if sign == "-" else value
