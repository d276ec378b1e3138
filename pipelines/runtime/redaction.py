"""Remove credentials from everything that is written: journals, tables, tracebacks, tracking."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from posttrain.errors import PosttrainError

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key)|sig|key|pwd)=)[^&;\s'\"]+"
)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,})"
)
_SECRET_NAME = re.compile(r"(?i)secret|passw(or)?d|credentials?($|_)|(^|_)token($|_)|(api|access|private)_?key")
_SHORTEST_SECRET = 8
_WORDS = ("true", "false", "disabled", "enabled")


def report_error(error: PosttrainError) -> int:
    """Print an error as one paragraph on stderr and return its exit status. For the edge of a command."""
    print(f"error: {redact(str(error))}", file=sys.stderr)
    return error.exit_code


def redact(text: str) -> str:
    """Return the text without credentials: URI user parts, signed query values, known tokens, values of secret variables."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def redacted(tree: Any) -> Any:
    """Apply `redact` to every string of a JSON-like tree."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, dict):
        return {key: redacted(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return tree


def _secrets() -> list[str]:
    """Return the values of environment variables with a secret-like name, longest first; paths and switches are not secrets."""
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and value.lower() not in _WORDS
    }
    return sorted((v for v in values if not v.startswith("/")), key=lambda v: (-len(v), v))
