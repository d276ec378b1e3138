"""Text of data, files and models inside Markdown that a browser shows."""

from __future__ import annotations

import re
from html import escape

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~])")


def markdown_text(text: str) -> str:
    """Return the text so that Markdown shows it as it is: no markup, link, picture or table cell begins in it."""
    return _SPECIAL.sub(r"\\\1", escape(text, quote=False)).replace("\n", " ")
