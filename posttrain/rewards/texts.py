r"""Compare answers that are words: without case, markup around them and a full stop at their end.

Example:
    >>> same_text("**Paris**.", "paris"), same_text("Paris, because it is the capital", "Paris"), same_text("$5", "5")
    (True, True, False)
"""

from __future__ import annotations

import re

from posttrain.rewards.choices import LATEX_TEXT
from posttrain.rewards.number_signs import seen
from posttrain.text import normalised

_PAIRS = ("**", "*", "``", "`", "$$", "$", '"', "'", "\u201c\u201d", "\u300c\u300d")
_UNDERLINED = re.compile(r"_([^_].*[^_]|[^_])_", re.DOTALL)
_TAGS = re.compile(r"</?(?:b|i|u|em|strong|p|span|code|mark|center)>", re.IGNORECASE)
_REASON = re.compile(r"[\s,(]+because\b|[,(]\s?since\b|\ssince\s(?:it|he|she|they|this|that|there|we)\b")
"""In small letters, since a title may hold the word: `Death Because of Love`."""
_COMMENT = re.compile(r"[.!]\s+(?=(?:It|He|She|They|Its|His|Her|Their)\s[a-z])")
_DOUBT = re.compile(
    r"\b(?:not|no|never|wrong|incorrect|false|mistake|wait|actually|but|however|rather|instead|answer|should|could|may|might)\b"
    r"|n['\u2019]t\b|[?]",
    re.IGNORECASE,
)
"""After an answer: it may take the answer back."""


def same_text(answer: str, gold: str) -> bool:
    """Return True if the answer is the gold answer, also before a reason (`Paris, because ...`) or comment (`Paris. It is ...`).

    An empty gold answer equals none.
    """
    expected = _bare(gold)
    forms = [answer, _REASON.split(answer, maxsplit=1)[0]]
    said, *rest = _COMMENT.split(answer, maxsplit=1)
    if rest and not _DOUBT.search(rest[0]):
        forms.append(said)
    return bool(expected) and expected in map(_bare, forms)


def _bare(text: str) -> str:
    """Return the text as it is compared. One of signs only, such as `...`, stays as it is."""
    text = LATEX_TEXT.sub(r"\1", _TAGS.sub("", seen(text))).replace("\u2019", "'")
    for _ in range(4):
        text = _unwrapped(normalised(text).rstrip(" !") or text.strip())
    return text


def _unwrapped(text: str) -> str:
    if found := _UNDERLINED.fullmatch(text):
        return found[1]
    if text.endswith("**") and not text.startswith("*"):
        return text[:-2].strip()  # **Answer: Paris**
    for pair in _PAIRS:
        start, end = (pair[0], pair[-1]) if pair[0] != pair[-1] else (pair, pair)
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
            return text[len(start) : len(text) - len(end)].strip()
    return text
