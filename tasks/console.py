"""Print the flow's own lines on the terminal and log them in Prefect."""

from __future__ import annotations

import time
from threading import Lock

from prefect.logging import get_run_logger

from pipelines.runtime.command_line import print_text
from pipelines.runtime.redaction import printable

_STARTED = time.monotonic()
_LOCK = Lock()


def print_line(text: str) -> None:
    """Print one line with the seconds since the command started."""
    with _LOCK:
        print_text(f"{time.monotonic() - _STARTED:7.1f} s  {printable(text)}")


def log_line(text: str) -> str:
    """Print the text, log it in the flow's log in Prefect, and return it."""
    print_line(text)
    get_run_logger().info(text)
    return text
