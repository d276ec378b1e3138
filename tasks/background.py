"""Run a function in a thread for the time of a `with` block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Start `work` in a daemon thread; at the end of the block set the event that it was given, and wait for its return.

    Example:
        >>> with in_background(lambda over: over.wait()):
        ...     threading.active_count() > 1
        True
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
