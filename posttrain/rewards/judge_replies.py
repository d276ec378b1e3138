"""Read the grade, the yes or no, or the verdict on a pair in a judge's short reply; a reply with two of them has none.

Double brackets count before words.

Example:
    >>> grade("7/10", 10), grade("<think>9?</think>Grade: 4", 10), grade("good", 10), grade("Not a 10, but an 8", 10)
    (7.0, 4.0, None, None)
    >>> verdict("B is better."), verdict("A tie"), verdict("A is better"), verdict("A is worse"), verdict("B is long, but [[A]]")
    ('B', 'tie', 'A', None, 'A')
    >>> agreed("Yes."), agreed("No, it is not."), agreed("There is no error.")
    (1.0, 0.0, None)
"""

from __future__ import annotations

import re

from posttrain.judges.marks import Choice, has_grade_mark, has_verdict_mark, marked_grade, marked_verdict
from posttrain.rewards.final_part import correction, final_part

_MARKUP = re.compile(r"[*_`#\"\u201c\u201d\[\](){}<>\\$]|\bboxed\b")
_SCALE = r"(?:\s*(?:/|out of|of)\s*{scale}(?![\d.,]))"
_RANGE = re.compile(
    r"(?:\b(?:on\s)?(?:a\s)?scale\s(?:of|from)\s|\bfrom\s|\bbetween\s)?\b1\s?(?:to|and|-|\u2013)\s?{scale}\b".replace(
        "{scale}", r"\d{1,6}"
    )
)
_NUMBER = re.compile(r"(?<![\w.,-])\d{1,6}(?![\w]|[.,]\d)")
_ANY_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LABELLED = re.compile(
    r"\b(?:grade|score|rating|mark|points?)\s*(?:is|of|:|=|-)*\s*(\d{1,6})(?![\w]|[.,]\d|\s?(?:-|\u2013|or|to)\s?\d)",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"\W*(yes|no)\b(?!\s?(?:doubt|matter|idea|one|problem|way|longer|wonder))", re.IGNORECASE)
_LAST_YES_NO = re.compile(r"(?:[:.,;!\n]|\bis|\bso|\banswer)\s*(yes|no)\W*\Z", re.IGNORECASE)
_NAMED = re.compile(
    r"\b(?:B|A(?! (?!(?:is|was|wins|has|beats|or|and|nor|over|because|since)\b)[a-z])|(?i:tie|tied|draw|equal|equally good|same))\b"
)
_TURNED = re.compile(
    r"\b(?:worse|inferior|loses|lost|weaker|neither|nor|not|never|than|but|except|wrong|incorrect|hard|depends)\b|n['\u2019]t\b",
    re.IGNORECASE,
)
_BETTER = r"(?:is|was)\s(?:(?:clearly|much|slightly|far|a bit|the)\s){0,2}(?:better|best|winner|preferred|stronger)"
_WINS = re.compile(
    r"(?i:\A\W*(?:the\s)?(?:better\s)?(?:answer|response|option|verdict|winner)?\W*(?:is\W*)?(?:(?:answer|response|option)\s)?)"
    rf"\b([AB])\b(?=\W*(?:\Z|\n|[.,;:!]\s|(?i:{_BETTER}|wins|beats)))"
)
"""A preferred answer at the beginning of a reply."""


def grade(text: str, scale: int) -> float | None:
    """Return the grade from 1 to `scale` that a reply gives; None if it gives none, or several that differ.

    Words give whole numbers only; double brackets may hold a decimal.
    """
    if has_grade_mark(text):
        return marked_grade(text, 1, scale)
    number = _grade_in_words(text, scale)
    return float(number) if number is not None and 1 <= number <= scale else None


def _grade_in_words(text: str, scale: int) -> int | None:
    said = _RANGE.sub(" ", _MARKUP.sub(" ", final_part(text)))
    said = re.sub(rf"(?<=\d){_SCALE.format(scale=scale)}", " ", said)
    first = re.match(r"\s*(\d{1,6})\s*(?:\n|\Z)", said)
    if first:
        return int(first[1])
    labelled = {int(found) for found in _LABELLED.findall(said)}
    if not labelled and len(_ANY_NUMBER.findall(said)) > 1 and len({*_ANY_NUMBER.findall(said)}) > 1:
        return None
    if not labelled and re.search(r"\bnot\b|n['\u2019]t\b", said):
        return None
    numbers = labelled or {int(found) for found in _NUMBER.findall(said)}
    return next(iter(numbers)) if len(numbers) == 1 else None


def agreed(text: str) -> float | None:
    """Return 1 for yes and 0 for no, by the first or the last word of a reply; None if they differ or are neither."""
    said = _MARKUP.sub(" ", final_part(text)).strip()
    first, last = _YES_NO.match(said), _LAST_YES_NO.search(said)
    words = {found[1].lower() for found in (first, last) if found}
    if first and re.match(r"\W*(?:yes and no|no and yes|yes\W{1,3}(?:and|or|/)?\W{0,3}no)\b", said, re.IGNORECASE):
        return None
    return None if len(words) != 1 else float(words == {"yes"})


def verdict(text: str) -> Choice | None:
    """Return the answer that a reply prefers, or `tie`; None if it names both, or takes one back."""
    if has_verdict_mark(text):
        return marked_verdict(text)
    said = _MARKUP.sub(" ", final_part(text)).strip()
    won = _WINS.match(said)
    if won and correction(said[won.end() :]) is None:
        return "A" if won[1] == "A" else "B"
    named: set[Choice] = {"A" if found == "A" else "B" if found == "B" else "tie" for found in _NAMED.findall(said)}
    if len(named) != 1 or _TURNED.search(said) or correction(said) is not None:
        return None
    return named.pop()
