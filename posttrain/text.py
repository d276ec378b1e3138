"""Small helpers for messages and for comparing texts."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'? Valid: ...`, for the end of an error message."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} Valid: {', '.join(names)}"


def normalised(text: str) -> str:
    """The text as leakage and duplicate checks compare it: Unicode form, case, punctuation and spacing folded away."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()
