"""The flow's own lines on the terminal: one at the start and one at the end of every stage."""

from __future__ import annotations

import sys
import time
from threading import Lock

_STARTED = time.monotonic()
_LOCK = Lock()


def say(text: str) -> None:
    """One line with the seconds since the command was typed."""
    with _LOCK:
        sys.stdout.write(f"{time.monotonic() - _STARTED:7.1f} s  {text}\n")
        sys.stdout.flush()
