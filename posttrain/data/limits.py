"""Bound the time and memory of code that works on what a model writes or brings, such as a chat template or a formula.

Example:
    >>> with bounded(seconds=60):
    ...     print(1 + 1)
    2
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

SECONDS = 10.0
REPEAT_SECONDS = 0.2
"""Time from one alarm to the next, for code that catches everything and goes on."""
BYTES = 2**30
"""Address space that one rendering may add: far more than any conversation needs."""
_STATM = Path("/proc/self/statm")


@contextmanager
def bounded(seconds: float = SECONDS, size: int = BYTES) -> Iterator[None]:
    """Raise TimeoutError after `seconds` (main thread only), and MemoryError beyond `size` more bytes (Linux only)."""
    with _time(seconds), _memory(size):
        yield


class _Expired(BaseException):
    """Raised inside the bounded code. No Exception, so that an `except Exception` there does not catch it."""


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    """Set the process's alarm. An alarm that is set already keeps its own time, and rings for its owner if it is due first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise _Expired

    outer, period = signal.getitimer(signal.ITIMER_REAL)
    if outer and outer <= seconds:
        yield
        return
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    # The alarm is repeated: Jinja ignores an error while it computes constants, and then computes them again.
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_SECONDS)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Expired:
        raise TimeoutError(f"it ran for more than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # again: the alarm may have rung just before the first of these calls
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - began), 1e-3), period)


@contextmanager
def _memory(size: int) -> Iterator[None]:
    if not _STATM.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(_STATM.read_text().split()[0]) * resource.getpagesize() + size
    within = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(within), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
