r"""Read the answer out of a completion: strictly, after a marker, or flexibly, else the last number; None if there is none.

Scale words multiply (1.5 million). A range, several alternatives (3 or 4) and a denied number (not 42) are no answer.

Strictly, an answer counts only if the words around it are understood (`assertions.py`).

Markers: "#### 42", "\boxed{42}", "<answer>42</answer>", "the answer is 42", "Answer: 42", and the same in other languages. The last
marker counts. After a marker, an expression that would need to be computed (6 * 7) is no answer: none of its numbers is taken for it.

Example:
    >>> strict("6 * 7 = 42, so the answer is **42**."), flexible("so he has 42 apples"), strict("so he has 42 apples")
    ('42', '42', None)
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Literal, NamedTuple

from posttrain.rewards.assertions import asserts, box_ends, second_number
from posttrain.rewards.boxes import BOXED, braced, signed_boxes
from posttrain.rewards.choices import chosen_letter, gold_letter
from posttrain.rewards.expressions import HIDDEN
from posttrain.rewards.final_part import correction, final_part, later_text, question_starts, rejection
from posttrain.rewards.number_words import spelt_number
from posttrain.rewards.texts import same_text
from posttrain.rewards.values import (
    cleaned,
    last_of,
    mentions_numbers,
    number_value,
    result_of,
    unscaled_value,
    values,
)

Extract = Literal["strict", "flexible"]
AnswerKind = Literal["number", "choice", "text"]
EXTRACTS: tuple[Extract, ...] = ("strict", "flexible")
KINDS: tuple[AnswerKind, ...] = ("number", "choice", "text")
_HASH = re.compile(
    r"(?<!#)#+[ \t]*(?=[*_]{0,3}[-+\u2212\u2013]?\\?[$\u20ac\u00a3]?[-+\u2212\u2013]?(?:[\d.\u00bc-\u00be\u2150-\u215e]|\\[dt]?frac))"
)
_WORD = re.compile(
    r"(?:\b(?:answers?|respuesta|r\u00e9ponse|risposta|resposta|antwort|antwoord|ergebnis|svar|cevap|odpowied\u017a|odpov\u011b\u010f"
    r"|\u043e\u0442\u0432\u0435\u0442|\u0111\u00e1p \u00e1n)\b|\u7b54\u6848|\u7b54\u3048|\uc815\ub2f5|\ub2f5|\u0909\u0924\u094d\u0924\u0930"
    r"|\u0627\u0644\u062c\u0648\u0627\u0628|\u0627\u0644\u0625\u062c\u0627\u0628\u0629)[*_\"')\] \t]*"
    r"(?:(?:is|es|est|ist|lautet|\u00e8|\u00e9|are|equals|\u0939\u0948|\u0647\u0648|\u0647\u064a)\b|[\u662f\u4e3a\u306f\uc740=:\uff1a\n])"
    r"(?:[*_:\uff1a \t\n]|(?:\\[\[(]|\${1,2})[ \t]*\n)*",
    re.IGNORECASE,
)
_TAG = re.compile(r"[<\[]answer[>\]](?=\s*[^\s<\[])", re.IGNORECASE)
_TAG_END = re.compile(r"[<\[]/answer", re.IGNORECASE)
_LINE_OF_NUMBER = 80
"""Characters; a longer line after one `#` is no number."""
_DETACHED_MINUS = re.compile(r"^[-\u2212\u2013][ \t]+(?=[\d$.])")
_FACTORIAL = re.compile(r"(?<=[\d)])\s?!(?!=)")
_GOES_ON = re.compile(r"[ \t]?(?:\^(?!\s?\{?\s?\\circ)|\\(?:pi|sqrt|cdot|times)(?![A-Za-z])|\u03c0|\u221a)")
"""After a box: it is a part of an expression."""
_OPENING = re.compile(r"[*_]{1,3}\Z")
_TITLED = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)\s*\Z", re.MULTILINE)
_NAMED = re.compile(r"\$?\s?[A-Za-z]\w{0,10}\s?=\s?([^=]+)")
_JOINED = re.compile(
    r"\\(?:boxed|fbox)\s*\{[^{}]{0,40}\}[$ ]{0,3}(?:,|or|and)[$ ]{0,3}(?:[A-Za-z]\s?=[$ ]{0,3})?$"
    r"|(?:\d|[)}]|(?<![A-Za-z])[A-Za-z])\s?(?:\\(?:times|cdot|div)(?![A-Za-z])|(?<![*])[*](?![*])|[+/^\u00d7\u00f7\u00b7])[$ {]{0,3}$"
)
"""Before a box: it is one of several, or a part of an expression, so that it is not the answer."""
_CONDITION = re.compile(r"\s(?:for|when|where|with|if|at|given)\s[$\\(]{0,3}[A-Za-z]\w{0,3}\s?=\s?[^\n]*")
"""After an answer: for which value of an unknown it holds, as in `42 for n = 3`."""


def extracted(completion: str, extract: Extract = "flexible", kind: AnswerKind = "number") -> str | None:
    """Return the answer that a completion gives, None if none is found."""
    if kind == "number":
        return strict(completion) if extract == "strict" else flexible(completion)
    text, loosely = final_part(completion), extract == "flexible"
    found = _last_marker(text)
    marked = found.answer if found else None
    if marked == HIDDEN or (found and not loosely and not found.is_asserted()):
        return None
    if kind == "choice":
        return chosen_letter(text, marked, loosely)
    if found is None:
        titled = _TITLED.search(text)
        return titled[1].strip() if titled else (text.strip() or None if loosely else None)
    if (later := later_text(found.said)) is not None:
        return later if loosely else None
    markup = _OPENING.search(found.match[0]) if found.match.re is _WORD else None
    return (markup[0] if markup else "") + found.answer or None


def strict(completion: str) -> str | None:
    """Return the number after the last marker; None if words such as `wait` take it back."""
    text = signed_boxes(final_part(completion))
    found = _last_marker(text)
    if found is None or not found.is_asserted() or found.is_changed():
        return None
    answer = _without_condition(found.answer)
    return result_of(answer, whole=True) if mentions_numbers(answer) else spelt_number(answer)


def flexible(completion: str) -> str | None:
    """Return the number after the last marker; if there is no marker, or only words after it, the last number."""
    text = signed_boxes(final_part(completion))
    found = _last_marker(text)
    marked = found.answer if found else None
    if found is not None and (later := found.taken_back()) is not None:
        return last_of(later)
    if marked is not None and mentions_numbers(marked):
        return result_of(_without_condition(marked))
    if marked is not None and (spelt := spelt_number(marked)):
        return spelt
    return last_of(text) if mentions_numbers(text) else spelt_number(text)


def _without_condition(answer: str) -> str:
    """Return the answer without the value of an unknown for which it holds; the placeholder if it has several cases."""
    found = _CONDITION.search(answer)
    if found is None or not mentions_numbers(answer[: found.start()]):
        return answer
    return HIDDEN if len(values(found[0])) > 1 else answer[: found.start()]


def gold_value(gold: str) -> Fraction | None:
    """Return the value of a gold answer: a number in digits or words, by itself, after a marker or after `x =`."""
    alone = number_value(gold)
    if alone is not None:
        return alone
    named = _NAMED.fullmatch(gold.strip())
    read = strict(gold) or (result_of(named[1]) if named else None) or spelt_number(gold)
    return None if read is None else number_value(read)


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
    """Return True if the extracted answer is one of the accepted ones; of texts, also if it is the JSON list itself."""
    return any(_equal(answer, one, kind) for one in gold_answers(gold)) or (kind == "text" and same_text(answer, gold))


def _equal(answer: str, gold: str, kind: AnswerKind) -> bool:
    if kind == "text":
        return same_text(answer, gold)
    if kind == "choice":
        return gold_letter(gold) == answer
    value, expected = number_value(answer), gold_value(gold)
    if value is None or expected is None:
        return False
    # A question in millions has the gold answer 1.5, and the right answer is "1.5 million".
    return value == expected or (unscaled_value(gold) is None and unscaled_value(answer) == expected)


class _Marked(NamedTuple):
    """A marker, the answer on its line, in its box or in its tag, and the text from the answer on."""

    match: re.Match[str]
    answer: str
    said: str
    inside: int = 0
    """Characters of `said` in the box."""

    def is_asserted(self) -> bool:
        """Return False if the text before the marker denies it, supposes it, or gives it to someone else."""
        return asserts(self.match.string[: self.match.start()], word=self.match.re is _WORD)

    def is_changed(self) -> bool:
        """Return True if the text after the answer takes it back, goes on with an expression, or gives a second number."""
        paragraph = self.said.split("\n\n", maxsplit=1)[0]
        if self.taken_back() is not None or correction(paragraph) is not None:
            return True
        if self.match.re is BOXED and not box_ends(self.said[self.inside :]):
            return True
        second = None if self.match.re is _TAG else second_number(paragraph)
        first = None if second is None else result_of(self.answer)
        return second is not None and number_value(second) != number_value(first or "")

    def taken_back(self) -> str | None:
        """Return the text after words that take the answer back: `The answer is 5. Wait, it is 6.`, `The answer is 5. That is wrong.`"""
        rest = rejection(self.said)
        if rest is not None:
            return rest
        later = correction(self.said)
        if later is None or not mentions_numbers(later):
            return None
        return later if mentions_numbers(self.said[: len(self.said) - len(later)]) else None


def _last_marker(text: str) -> _Marked | None:
    """Return the last marker and the answer after it. A further question, which follows an answer, is left out."""
    found = [match for pattern in (_HASH, _WORD, BOXED, _TAG) for match in pattern.finditer(text)]
    first = min((match.start() for match in found if match[0].strip() != "#"), default=len(text))
    text = text[: next((start for start in question_starts(text) if start > first), len(text))]
    for match in sorted(found, key=lambda match: match.start(), reverse=True):
        if match.end() > len(text):
            continue
        if match.re is BOXED:
            inside = braced(text, match.end())
            return _Marked(
                match, _boxed(text, match, inside), inside + text[match.end() + len(inside) + 1 :], len(inside)
            )
        if match.re is _TAG:
            inside, *rest = _TAG_END.split(text[match.end() :], maxsplit=1)
            return _Marked(match, inside.strip(), f"{inside.strip()}. {rest[0].lstrip('>]')}" if rest else inside)
        said = text[match.end() :]
        line = said.split("\n", maxsplit=1)[0].strip()
        if line and (match.re is _WORD or match[0].startswith("##") or _ends_with_a_number(line)):
            return _Marked(match, line if "\n" in match[0] else _DETACHED_MINUS.sub("-", line), said)
    return None


def _ends_with_a_number(line: str) -> bool:
    """Return False for `#1 choice` and `#74+5`: one `#` marks only a number that ends its line."""
    after = cleaned(line) if len(line) <= _LINE_OF_NUMBER else ""
    first = values(after)[:1]
    return bool(first) and not after.partition(first[0])[2].strip(" \t.!?)%]")


def _boxed(text: str, match: re.Match[str], inside: str) -> str:
    """Return the inside of a box; the placeholder if it is one of several boxes, or a part of an expression."""
    several = _JOINED.search(text[max(0, match.start() - 60) : match.start()])
    if several or _GOES_ON.match(text, match.end() + len(inside) + 1):
        return HIDDEN
    return _FACTORIAL.sub(HIDDEN, inside).strip()
