"""Text of data, files and models inside Markdown and HTML that a browser shows."""

from __future__ import annotations

import re
from html import escape

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~])")


def markdown_text(text: str) -> str:
    """Return the text so that Markdown shows it as it is: no markup, link, picture or table cell begins in it."""
    return _SPECIAL.sub(r"\\\1", escape(text, quote=False)).replace("\n", " ")


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
.scroll{overflow-x:auto;margin:.5rem 0 2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #d1d9e0;vertical-align:top}
th.n,td.n{text-align:right;font-variant-numeric:tabular-nums}code{font-size:13px;overflow-wrap:anywhere}
h1 small{font-weight:400;color:#59636e}mark{background:#aceebb}
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """Return a page without scripts, other files or network, which fits a phone. `body` is HTML, `style` more CSS."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>{body}</body></html>\n"
    )


def html_table(head: str, rows: str) -> str:
    """Return a table that scrolls by itself if the screen is narrower. `head` and `rows` are HTML."""
    return f'<div class="scroll"><table>{head}{rows}</table></div>'
