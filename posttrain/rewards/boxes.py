r"""Find the boxes of LaTeX, and move a sign in front of a box into it: -\boxed{7} is \boxed{-7}.

Example:
    >>> signed_boxes(r"It is $-\boxed{7}$, or 3 - \boxed{x + 1}, or -\boxed{x + 1}")
    'It is $\\boxed{-7}$, or 3 - \\boxed{x + 1}, or \\boxed{-(x + 1)}'
"""

from __future__ import annotations

import re

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SIGNED = re.compile(
    r"(?:(?<=[=:(\[,$*])|(?<=\bis)|(?<=\bare)|(?<=\bequals)|(?<![^\n])|(?<=[A-Za-z*][ \t])(?=[-\u2212\u2013][\\$]))[ \t]{0,3}"
    r"[-\u2212\u2013](?P<space>[ \t]?)(?P<dollar>\$?[ \t]?)\\(?:boxed|fbox)\s*\{"
)
_SIMPLE = re.compile(r"[\w.\\$][\w.,]*|\\[dtc]?frac\{\d+\}\{\d+\}")


def braced(text: str, start: int) -> str:
    """Return the text from `start`, which follows an opening brace, to the brace that closes it, or to the end."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start:]


def signed_boxes(text: str) -> str:
    """Return the text with each sign in front of a box inside it. A minus between two terms and the dash of a list are left."""
    parts, place = list[str](), 0
    for found in _SIGNED.finditer(text):
        if found.start() < place:
            continue
        if found["space"] and text[: found.start()].rpartition("\n")[2].strip() == "" and not found["dollar"]:
            continue  # the dash of a list
        inside = braced(text, found.end())
        lead = found[0].index("\\")
        sign = re.sub(r"[-\u2212\u2013]", "", found[0][:lead]) + found[0][lead:]
        parts += [text[place : found.start()], sign, f"-{inside}" if _SIMPLE.fullmatch(inside) else f"-({inside})"]
        place = found.end() + len(inside)
    return "".join([*parts, text[place:]])
