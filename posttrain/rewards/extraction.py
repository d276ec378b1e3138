r"""Read the answer out of a completion: strictly, after a marker, or flexibly, else the last number; None if there is none.

Markers: "#### 42", "\boxed{42}", "the answer is 42", "Answer: 42", and the same in other languages. The last marker counts.

Example:
    >>> strict("6 * 7 = 42, so the answer is **42**."), flexible("so he has 42 apples"), strict("so he has 42 apples")
    ('42', '42', None)
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Literal

from posttrain.environments.numbers import parse_number
from posttrain.text import normalised

Extract = Literal["strict", "flexible"]
AnswerKind = Literal["number", "choice", "text"]
EXTRACTS: tuple[Extract, ...] = ("strict", "flexible")
KINDS: tuple[AnswerKind, ...] = ("number", "choice", "text")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_POWER = r"\s?(?:x|\u00d7|\\times|\\cdot|\u00b7|\*)\s?10\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?"
_SIGN = r"(?:(?<![A-Za-z0-9_)\]])[-+](?=[$\u20ac\u00a3\d.\\]))?"
_VALUE = re.compile(
    rf"{_SIGN}\\[dt]?frac\s?\{{\d{{1,30}}\}}\s?\{{\d{{1,30}}\}}"
    rf"|(?<![A-Za-z0-9_.,]){_SIGN}\d{{1,30}}\s\d{{1,30}}/\d{{1,30}}(?![A-Za-z0-9_/])"
    rf"|(?<![A-Za-z0-9_.]){_SIGN}[$\u20ac\u00a3]?[-+]?(?:{_DIGITS})(?:{_POWER}|[eE][-+]?\d{{1,3}}|/\d{{1,30}})?"
    r"(?![A-Za-z0-9_]|\.\d|,\d{3}(?!\d))",
    re.ASCII,
)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s?\{(\d+)\}\s?\{(\d+)\}")
_MIXED = re.compile(r"([-+]?)(\d+)\s(\d+)/(\d+)")
_SCIENTIFIC = re.compile(rf"(?P<digits>[-+]?[$\u20ac\u00a3]?[-+]?(?:{_DIGITS})){_POWER}")
_HASH = re.compile(r"#+[ \t]*(?=[-+$\u20ac\u00a3.\\]?[\d.])(?=(?P<after>[^\n]*))")
_WORD = re.compile(
    r"(?:\b(?:answers?|respuesta|r\u00e9ponse|risposta|resposta|antwort|ergebnis|\u043e\u0442\u0432\u0435\u0442)\b"
    r"|\u7b54\u6848|\u7b54\u3048)[*_\"')\] \t]*"
    r"(?:(?:is|es|est|ist|\u00e8|\u00e9|are|equals)\b|[\u662f\u4e3a\u306f=:\uff1a\n])"
    r"[*_: \t\n]*(?=(?P<after>[^\n]*))",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CLEAN = (
    ("\u2212", "-"),
    ("{,}", ","),
    ("\\,", ""),
    ("\\!", ""),
    ("\\$", "$"),
    ("\\%", "%"),
    ("\\left", ""),
    ("\\right", ""),
)
_THIN = re.compile(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))")
_LETTER = r"[A-J]"
_CHOICES = (
    rf"(?:\(|\[|\*\*|\b(?:option|choice)\s+)\(?({_LETTER})\b",
    rf"^\W*({_LETTER})(?:[).:,*]|\W*$)",
    rf"(?<![A-Za-z])({_LETTER})(?![A-Za-z'\u2019])",
)


def extracted(completion: str, extract: Extract = "flexible", kind: AnswerKind = "number") -> str | None:
    """Return the answer that a completion gives, None if none is found."""
    if kind == "number":
        return strict(completion) if extract == "strict" else flexible(completion)
    marked = _marked(completion)
    if kind == "text":
        return marked or (completion.strip() or None if extract == "flexible" else None)
    found = _choice(marked, _CHOICES) if marked is not None else _choice(completion, _CHOICES[1:2])
    return found or (_choice(completion, _CHOICES) if extract == "flexible" else None)


def strict(completion: str) -> str | None:
    """Return the number after the last marker."""
    marked = _marked(completion)
    if marked is None:
        return None
    # of an equation, the answer is what it comes to
    found = _VALUE.search(marked.rpartition("=")[2]) or _VALUE.search(marked)
    return found[0] if found else None


def flexible(completion: str) -> str | None:
    """Return the number after the last marker; without one, the last number."""
    marked = strict(completion)
    if marked is not None:
        return marked
    found = [match[0] for match in _VALUE.finditer(_cleaned(completion))]
    return found[-1] if found else None


def number_value(text: str) -> Fraction | None:
    r"""Return the value of one number, also 3 1/2, 3 x 10^2 and \frac{1}{2}; None if it is none."""
    text = _cleaned(text).strip().strip("*_$ ").rstrip(".")
    if found := _FRACTION.fullmatch(text):
        return _ratio(found[1], 0, int(found[2]), int(found[3]))
    if found := _MIXED.fullmatch(text):
        return _ratio(found[1], int(found[2]), int(found[3]), int(found[4]))
    if found := _SCIENTIFIC.fullmatch(text):
        digits = parse_number(found["digits"])
        return None if digits is None else digits * Fraction(10) ** int(found["power"])
    return parse_number(text)


def gold_value(gold: str) -> Fraction | None:
    """Return the value of a gold answer: a number, by itself or after a marker."""
    alone = number_value(gold)
    marked = strict(gold) if alone is None else None
    return number_value(marked) if marked is not None else alone


def gold_answers(gold: str) -> list[str]:
    """Return the accepted answers: a JSON list of texts holds several."""
    if gold.startswith('["'):
        try:
            listed = json.loads(gold)
        except ValueError:
            return [gold]
        if isinstance(listed, list) and all(isinstance(one, str) for one in listed):
            return listed
    return [gold]


def equal(answer: str, gold: str, kind: AnswerKind = "number") -> bool:
    """Return True if the extracted answer is one of the accepted ones."""
    return any(_equal(answer, one, kind) for one in gold_answers(gold))


def _equal(answer: str, gold: str, kind: AnswerKind) -> bool:
    if kind == "text":
        return normalised(answer) == normalised(gold)
    if kind == "choice":
        return _choice(gold, _CHOICES) == answer
    value = number_value(answer)
    return value is not None and value == gold_value(gold)


def _marked(completion: str) -> str | None:
    """Return the text after the last marker, on its line or in its box."""
    text = _cleaned(completion)
    found = [(m.start(), m["after"]) for pattern in (_HASH, _WORD) for m in pattern.finditer(text) if _is_marker(m)]
    found += [(m.start(), _braced(text, m.end())) for m in _BOXED.finditer(text)]
    return max(found)[1].strip() if found else None


def _is_marker(match: re.Match[str]) -> bool:
    """Return False for `#1 choice` and `#74+5`: one `#` marks only a number that ends its line."""
    if match.re is not _HASH or match[0].startswith("##"):
        return bool(match["after"].strip())
    value = _VALUE.match(match["after"])
    return value is not None and not match["after"][value.end() :].strip(" \t.!?)%]")


def _braced(text: str, start: int) -> str:
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start:]


def _choice(text: str | None, patterns: tuple[str, ...]) -> str | None:
    for pattern in patterns if text else ():
        found = re.findall(pattern, text or "", re.MULTILINE)
        if found:
            return str(found[-1]).upper()
    return None


def _cleaned(text: str) -> str:
    for old, new in _CLEAN:
        text = text.replace(old, new)
    return _THIN.sub("", text)


def _ratio(sign: str, whole: int, top: int, bottom: int) -> Fraction | None:
    if not bottom:
        return None
    value = whole + Fraction(top, bottom)
    return -value if sign == "-" else value
