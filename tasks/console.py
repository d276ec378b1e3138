"""The flow's own lines: on the terminal, and in the flow's log in Prefect."""

from __future__ import annotations

import sys
import time
from threading import Lock

from prefect.logging import get_run_logger

from pipelines.runtime.redaction import printable

_STARTED = time.monotonic()
_LOCK = Lock()


def say(text: str) -> None:
    """One line with the seconds since the command was typed."""
    with _LOCK:
        sys.stdout.write(f"{time.monotonic() - _STARTED:7.1f} s  {printable(text)}\n")
        sys.stdout.flush()


def tell(text: str) -> str:
    """The text to the terminal and to the flow's log in Prefect; gives it back."""
    say(text)
    get_run_logger().info(text)
    return text
