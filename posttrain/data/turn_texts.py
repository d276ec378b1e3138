"""Compare the text of a turn with its text in a rendered chat template.

Example:
    >>> after_reasoning("<think>2 is even</think>\\n\\nYes"), plain("A \\n  b")
    ('\\n\\nYes', 'a b')
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
_CLOSED = re.compile(r"</\w+>|\[/\w+\]|<\|\w+\|>")
"""The end of reasoning, which templates may cut off."""
_TAGS = re.compile(r"</?\w+>|\[/?\w+\]|<\|\w+\|>")
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold its reasoning."""


def hidden_reasoning(text: str, messages: Sequence[Message]) -> list[int]:
    """Return the assistant turns whose reasoning, in its own field or in tags, the rendered text lacks.

    Many templates leave it out of earlier turns on purpose.
    """
    shown = plain(text)
    found = []
    for i, message in enumerate(messages):
        fields = [message.get(name) for name in _REASONING]
        content = message.get("content")
        inline = content[: len(content) - len(after_reasoning(content))] if isinstance(content, str) else ""
        parts = [*(part for part in fields if isinstance(part, str)), *_TAGS.split(inline)]
        if message.get("role") == "assistant" and any(plain(part) not in shown for part in parts):
            found.append(i)
    return found


class Shown:
    """A rendered conversation, in which texts of turns are looked for, perhaps quoted as JSON."""

    def __init__(self, text: str) -> None:
        self._plain, self._as_written = plain(text), " ".join(text.split())

    def has(self, text: str) -> bool:
        """Return True if it has the text, whatever its case and white space."""
        return any(plain(one) in self._plain for one in _spellings(text))

    def has_as_written(self, text: str) -> bool:
        """Return True if it has the letters of the text, whatever its white space."""
        return any(" ".join(one.split()) in self._as_written for one in _spellings(text))


def _spellings(text: str) -> tuple[str, str, str]:
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def after_reasoning(content: str) -> str:
    """Return the part of a turn that every template shows."""
    last = _CLOSED.split(content)[-1]
    return last if last.strip() else content


def plain(text: str) -> str:
    """Return a text with single spaces, in small letters."""
    return " ".join(text.split()).casefold()


def place_of(content: str, text: str, start: int, stop: int) -> tuple[int, int] | None:
    """Return the characters within [start, stop) of a rendered text that are the turn's own, None if it is not there as it is written.

    A template may leave out its reasoning.
    """
    for own in dict.fromkeys((content.strip(), after_reasoning(content).strip())):
        place = text.rfind(own, start, stop) if own else -1
        if place >= 0:
            return place, place + len(own)
    return None


def shorter(text: str) -> str:
    """Return a text as one short line, in quotes."""
    line = repr(" ".join(text.split()))
    return line if len(line) <= 60 else line[:57] + "…" + line[0]
