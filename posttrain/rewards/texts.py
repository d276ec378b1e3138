r"""Compare answers that are words: without case, markup around them and a full stop at their end.

Example:
    >>> same_text("**Paris**.", "paris"), same_text("Paris, because it is the capital", "Paris"), same_text("$5", "5")
    (True, True, False)
"""

from __future__ import annotations

import re

from posttrain.rewards.choices import LATEX_TEXT
from posttrain.text import normalised

_PAIRS = ("**", "*", "``", "`", "$$", "$", '"', "'", "\u201c\u201d", "\u300c\u300d")
_UNDERLINED = re.compile(r"_([^_].*[^_]|[^_])_", re.DOTALL)
_REASON = re.compile(r"[\s,(]+(?:because|since)\b", re.IGNORECASE)


def same_text(answer: str, gold: str) -> bool:
    """Return True if the answer, or what comes before its reason (`Paris, because ...`), is the gold answer; an empty one is none."""
    expected = _bare(gold)
    return bool(expected) and expected in (_bare(answer), _bare(_REASON.split(answer, maxsplit=1)[0]))


def _bare(text: str) -> str:
    """Return the text as it is compared. One of signs only, such as `...`, stays as it is."""
    text = LATEX_TEXT.sub(r"\1", text).replace("\u2019", "'")
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
