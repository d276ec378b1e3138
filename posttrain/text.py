"""Helpers for error messages and for comparing texts.

Example:
    >>> nearest("grop", ["grpo", "dpo"])
    "; did you mean 'grpo'? Valid: dpo, grpo"
    >>> nearest("n\u0303", ["\u00f1"])
    "; '\xf1' has the same letters in a different Unicode form: copy it. Valid: \xf1"
    >>> normalised("What is  2+2?") == normalised("what is 2+2"), normalised("8-3") == normalised("8+3")
    (True, False)
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_NAMES = "think|thinking|thought|thoughts|reasoning|reason|scratchpad"
_CLOSED = re.compile(rf"</(?:{_NAMES})>|\[/(?:{_NAMES})\]|\u25c1/think\u25b7", re.IGNORECASE)
_OPENED = re.compile(rf"<(?:{_NAMES})>|\[(?:{_NAMES})\]|\u25c1think\u25b7", re.IGNORECASE)
_UNSEEN = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
"""Soft hyphens, zero-width spaces, marks of direction and marks of byte order."""
_SPACED_SIGN = re.compile(r" ?([-+*/^=<>\u00d7\u00f7\u2212\u2260\u2264\u2265]) ?")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]{0,40}<\|message\|>")
"""How gpt-oss separates its reasoning (`analysis`) from its answer (`final`)."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'? Valid: ...`, for the end of an error message."""
    names = sorted(valid)
    if not names:
        return "; there is none to choose from"
    same = [one for one in names if one.casefold() == name.strip().casefold()]
    spelt = [
        one for one in names if one != name and unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", name)
    ]
    if spelt:
        return f"; {spelt[0]!r} has the same letters in a different Unicode form: copy it. Valid: {', '.join(names)}"
    close = same or difflib.get_close_matches(name.casefold(), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} Valid: {', '.join(names)}"


def shortened(value: Any, most: int = 60) -> str:
    """Return a value as text of one short line, for an error message.

    Example:
        >>> shortened(["a" * 100], most=10)
        "['aaaaaaa…"
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def reason_of(error: BaseException) -> str:
    """Return the error's type and the first line of its text, for the end of a message; PyTorch's may have a hundred lines.

    Example:
        >>> reason_of(ValueError("no such kernel" + chr(10) + "registered at ..."))
        'ValueError: no such kernel'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def one_line(text: str) -> str:
    """Return an error's text as one line: its first line and its last one that is neither decoration nor an entry of a list.

    Example:
        >>> one_line("***" + chr(10) + "No corpus." + chr(10) + "Tried: words" + chr(10) + "Searched in:" + chr(10) + "  - /tmp")
        'No corpus. … Tried: words'
    """
    lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))]
    while len(lines) > 1 and lines[0].endswith(":"):  # the type of an error whose text begins with an empty line
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    if len(lines) < 2:
        return "".join(lines)[:300] or text.strip()
    last = [line for line in lines[1:] if not line.startswith(("- ", "* ", ">>> ")) and not line.endswith(":")]
    return " … ".join(line[:300] for line in [lines[0], *last[-1:]])


def normalised(text: str) -> str:
    """Return the text as leakage and duplicate checks compare it: one Unicode form, no case, single spaces.

    Signs stay: 8-3 is not 8+3, and a vowel sign makes a different word. Only a full stop or question mark at the end does not count, and
    marks that no reader sees, such as those of a line's direction. Joiners stay, because they change letters.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", _UNSEEN.sub("", text)).casefold())
    return " ".join(folded.split()).rstrip(" .?。？")


def as_prompt(text: str) -> str:
    """Return the text as prompts are compared: `normalised`, and without spaces around the signs of a formula.

    Example:
        >>> as_prompt("15 + 0 ="), as_prompt("15+0="), as_prompt("1, 234"), as_prompt("1,234")
        ('15+0=', '15+0=', '1, 234', '1,234')
    """
    return _SPACED_SIGN.sub(r"\1", normalised(text))


def is_blank(text: str) -> bool:
    """Return True if a text has no character that a reader sees.

    Example:
        >>> is_blank(" \\u200b\\ufeff"), is_blank("."), is_blank("")
        (True, False, True)
    """
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def letters_and_digits(text: str) -> str:
    """Return only the words of a text: the part that stays similar if punctuation or signs change."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def after_reasoning(text: str) -> str:
    """Return a model's text after its reasoning; empty if the reasoning has not ended.

    Example:
        >>> after_reasoning("<think>6? no</think>It is 5."), after_reasoning("<think>the answer is 6")
        ('It is 5.', '')
    """
    channels = list(_CHANNEL.finditer(text))
    if channels:
        text = text[channels[-1].end() :] if channels[-1][1] == "final" else ""
    closed = list(_CLOSED.finditer(text))
    after = text[closed[-1].end() :] if closed else text
    opened = _OPENED.search(after)
    return after[: opened.start()] if opened else after
