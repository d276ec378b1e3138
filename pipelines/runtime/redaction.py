"""Remove credentials from everything that is written: journals, tables, tracebacks, tracking."""

from __future__ import annotations

import logging
import os
import re
import traceback
from typing import Any

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY = re.compile(
    r"(?i)([?&;](?:[\w-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key)|sig|key|pwd)=)[^&;\s'\"]+"
)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,})"
)
_HEADER = re.compile(r"(?i)\b(bearer|basic) +(?=[^ ]*[0-9=])[A-Za-z0-9._~+/=-]{12,}")
_AZURE = re.compile(r"(?i)\b((?:Account|SharedAccess)(?:Key|Signature)=)[^;\s'\"]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that end a line or turn the direction of the text that follows."""
_SECRET_NAME = re.compile(
    r"(?i)secret|passw(or)?d|credentials?($|_)|(^|_)(token|pass|pwd|sas)($|_)|(api|access|private|account|storage)_?key"
    r"|auth_string|connection_string|webhook"
)
_SHORTEST_SECRET = 4
_WHOLE_WORD = 8
"""A shorter secret is hidden only as a word by itself: as a part of words it would eat the text."""
_WORDS = ("true", "false", "disabled", "enabled")


def redact(text: str) -> str:
    """Return the text without credentials: URI user parts, signed query values, known tokens, values of secret variables."""
    for secret in _secrets():
        if len(secret) >= _WHOLE_WORD:
            text = text.replace(secret, HIDDEN)
        elif secret in text:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    text = _USER.sub(HIDDEN, text)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _HEADER.sub(rf"\g<1> {HIDDEN}", text)
    text = _AZURE.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def printable(text: str) -> str:
    """Return the text with control characters spelt out: a file's name could otherwise rewrite the terminal."""
    return _CONTROL.sub(_spelt, text)


def _spelt(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


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
    """Values of environment variables whose name says secret, longest first; existing paths and switches are no secrets."""
    named = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and value.lower() not in _WORDS}
    # of `user:password` the password, which appears without its user at a login
    parts = {value.rpartition(":")[2] for name, value in os.environ.items() if name.endswith("AUTH_STRING")}
    found = {value for value in named | parts if len(value) >= _SHORTEST_SECRET}
    return sorted((v for v in found if not (v.startswith("/") and os.path.exists(v))), key=lambda v: (-len(v), v))


def redact_log_records() -> None:
    """Hide credentials in every log record of this process, in its message and in its chained traceback."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def factory(*args: Any, **options: Any) -> logging.LogRecord:
        record = make(*args, **options)
        if record.name.startswith("prefect"):
            record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)
