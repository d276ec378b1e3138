r"""Read the answer out of a completion: strictly, after a marker, or flexibly, else the last number; None if there is none.

Scale words multiply (1.5 million). A range, several alternatives (3 or 4) and a denied number (not 42) are no answer.

Markers: "#### 42", "\boxed{42}", "<answer>42</answer>", "the answer is 42", "Answer: 42", and the same in other languages. The last
marker counts. After a marker, an expression that would need to be computed (6 * 7) is no answer: none of its numbers is taken for it.

Example:
    >>> strict("6 * 7 = 42, so the answer is **42**."), flexible("so he has 42 apples"), strict("so he has 42 apples")
    ('42', '42', None)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

from posttrain.rewards.values import (
    cleaned,
    last_of,
    mentions_numbers,
    number_value,
    result_of,
    unscaled_value,
    values,
)
from posttrain.text import normalised

Extract = Literal["strict", "flexible"]
AnswerKind = Literal["number", "choice", "text"]
EXTRACTS: tuple[Extract, ...] = ("strict", "flexible")
KINDS: tuple[AnswerKind, ...] = ("number", "choice", "text")
_HASH = re.compile(r"(?<!#)#+[ \t]*(?=[-+\u2212\u2013$\u20ac\u00a3.\\]?[\d.])")
_WORD = re.compile(
    r"(?:\b(?:answers?|respuesta|r\u00e9ponse|risposta|resposta|antwort|antwoord|ergebnis|svar|cevap|odpowied\u017a|odpov\u011b\u010f"
    r"|\u043e\u0442\u0432\u0435\u0442|\u0111\u00e1p \u00e1n)\b|\u7b54\u6848|\u7b54\u3048|\uc815\ub2f5|\ub2f5|\u0909\u0924\u094d\u0924\u0930"
    r"|\u0627\u0644\u062c\u0648\u0627\u0628|\u0627\u0644\u0625\u062c\u0627\u0628\u0629)[*_\"')\] \t]*"
    r"(?:(?:is|es|est|ist|\u00e8|\u00e9|are|equals|\u0939\u0948|\u0647\u0648|\u0647\u064a)\b|[\u662f\u4e3a\u306f\uc740=:\uff1a\n])"
    r"(?:[*_: \t\n]|(?:\\[\[(]|\${1,2})[ \t]*\n)*",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TAG = re.compile(r"[<\[]answer[>\]](?=\s*[^\s<\[])", re.IGNORECASE)
_TAG_END = re.compile(r"[<\[]/answer", re.IGNORECASE)
_LINE_OF_NUMBER = 80
"""Characters; a longer line after one `#` is no number."""
_DETACHED_MINUS = re.compile(r"^[-\u2212\u2013][ \t]+(?=[\d$.])")
_NAMED_CHOICE = re.compile(
    r"[(\[]([A-Ja-j])[)\]]|\*\*\(?([A-J])\b|\b(?i:option|choice)\s+\(?([A-J])\b|\b(?i:option|choice)\s+\(?([a-j])(?=[).,:]|\s*$)",
    re.MULTILINE,
)
_LEADING_CHOICE = re.compile(r"^\W*(?:([A-HJ]),|([A-Ja-j])(?:[).:*](?![A-Za-z])|\W*$))", re.MULTILINE)
_ANY_CHOICE = re.compile(
    r"(?<![A-Za-z])([A-J])(?![A-Za-z'\u2019=])(?!(?<=[AI])\s+(?!(?:is|are|was|because|since|as|and|or)\b)[a-z])"
)
"""A letter by itself, unless it is the word `A` or `I`."""
_CHOICES = (_NAMED_CHOICE, _LEADING_CHOICE, _ANY_CHOICE)
_SEVERAL = re.compile(r"[A-J]\W{0,3}\s(?:and|or)\s\W{0,3}[A-J]\b|\b[A-J]\s?[/&]\s?[A-J]\b")
_MARKUP = " \t\n*_`$\"'\u201c\u201d\u300c\u300d"
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")


def extracted(completion: str, extract: Extract = "flexible", kind: AnswerKind = "number") -> str | None:
    """Return the answer that a completion gives, None if none is found."""
    if kind == "number":
        return strict(completion) if extract == "strict" else flexible(completion)
    marked = _marked(completion)
    if kind == "text":
        return marked or (completion.strip() or None if extract == "flexible" else None)
    if marked is not None and _SEVERAL.search(marked):
        return None
    found = _letters(marked, _CHOICES)[:1] if marked is not None else _letters(completion, [_LEADING_CHOICE])[-1:]
    if not found and extract == "flexible":
        found = _letters(completion, _CHOICES)[-1:]
    return found[0] if found else None


def strict(completion: str) -> str | None:
    """Return the number after the last marker."""
    marked = _marked(completion)
    return None if marked is None else result_of(marked)


def flexible(completion: str) -> str | None:
    """Return the number after the last marker; if there is no marker, or only words after it, the last number."""
    marked = _marked(completion)
    if marked is not None and mentions_numbers(marked):
        return result_of(marked)
    return last_of(completion)


def gold_value(gold: str) -> Fraction | None:
    """Return the value of a gold answer: a number, by itself or after a marker."""
    alone = number_value(gold)
    marked = strict(gold) if alone is None else None
    return number_value(marked) if marked is not None else alone


def gold_choice(gold: str) -> str | None:
    """Return the letter of a gold answer, such as `b`, `(B)` or `B. Paris`; None if it is none."""
    return next(iter(_letters(gold, _CHOICES)), None)


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
        return _bare(answer) == _bare(gold)
    if kind == "choice":
        return gold_choice(gold) == answer
    value, expected = number_value(answer), gold_value(gold)
    if value is None or expected is None:
        return False
    # A question in millions has the gold answer 1.5, and the right answer is "1.5 million".
    return value == expected or (unscaled_value(gold) is None and unscaled_value(answer) == expected)


def _marked(completion: str) -> str | None:
    """Return the text after the last marker: on its line, in its box or in its tag."""
    found = [match for pattern in (_HASH, _WORD, _BOXED, _TAG) for match in pattern.finditer(completion)]
    for match in sorted(found, key=lambda match: match.start(), reverse=True):
        if match.re is _BOXED:
            return _braced(completion, match.end()).strip()
        if match.re is _TAG:
            return _TAG_END.split(completion[match.end() :], maxsplit=1)[0].strip()
        text = completion[match.end() :].split("\n", maxsplit=1)[0].strip()
        if text and (match.re is _WORD or match[0].startswith("##") or _ends_with_a_number(text)):
            return text if "\n" in match[0] else _DETACHED_MINUS.sub("-", text)
    return None


def _ends_with_a_number(line: str) -> bool:
    """Return False for `#1 choice` and `#74+5`: one `#` marks only a number that ends its line."""
    after = cleaned(line) if len(line) <= _LINE_OF_NUMBER else ""
    first = values(after)[:1]
    return bool(first) and not after.partition(first[0])[2].strip(" \t.!?)%]")


def _braced(text: str, start: int) -> str:
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start:]


def _letters(text: str, patterns: Iterable[re.Pattern[str]]) -> list[str]:
    """Return the letters that the first pattern with a match finds."""
    for pattern in patterns:
        found = [str(match[match.lastindex or 0]).upper() for match in pattern.finditer(_LATEX_TEXT.sub(r"\1", text))]
        if found:
            return found
    return []


def _bare(text: str) -> str:
    """Return a text as answers are compared: without case, markup around it and a full stop at its end."""
    return normalised(normalised(_LATEX_TEXT.sub(r"\1", text).strip(_MARKUP)).strip(_MARKUP))
