"""Try if the system grants threads. The standard library only: the fork server, which may serve a different checkout, loads this too."""

from __future__ import annotations

import threading


def require_threads(count: int) -> None:
    """Raise RuntimeError if the system refuses to run so many threads at once."""
    over, started = threading.Event(), list[threading.Thread]()
    try:
        for _ in range(count):
            thread = threading.Thread(target=over.wait)
            thread.start()
            started.append(thread)
    finally:
        over.set()
        for thread in started:
            thread.join()
