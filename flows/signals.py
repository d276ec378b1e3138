"""Ctrl-C and TERM during a flow: stop its stages cleanly, then end it Cancelled."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def raise_interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """For the time before and after the stages: unwind, so that whatever was started is stopped."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def stop_on_signal(stop: Event) -> Iterator[None]:
    """While inside, a signal sets `stop`: the flow then ends itself Cancelled, also when a Prefect worker sent it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
