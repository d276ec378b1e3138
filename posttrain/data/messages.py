"""Whole conversations: which turns are learnt.

Example:
    >>> asked, answered, greets = parted([{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}])
    >>> asked, answered, greets
    ([{'role': 'user', 'content': '1+1='}], [{'role': 'assistant', 'content': '2'}], False)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def parted(turns: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], bool]:
    """Return the turns before the first answer, those from it on, and True if the conversation begins with the assistant.

    Its greeting answers nothing, so it belongs to the first part and is not trained.
    """
    asked = [i for i, turn in enumerate(turns) if turn["role"] != "system"]
    greets = bool(asked) and turns[asked[0]]["role"] == "assistant"
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"][1 if greets else 0 :]
    first = answers[0] if answers else len(turns)
    return list(turns[:first]), list(turns[first:]), greets
