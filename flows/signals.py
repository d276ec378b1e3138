"""Ctrl-C and TERM during a flow: stop its stages cleanly first, then do what the caller had in mind."""

from __future__ import annotations

import signal
import sys
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
    """While inside, a signal sets `stop`. On leaving, Prefect's own handler (a worker's cancellation) gets the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[signal.Signals] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        stop.set()

    before = {number: signal.signal(number, note) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in received[:1]:
        handler = before[number]
        ours = handler in (raise_interrupt, signal.default_int_handler)
        if callable(handler) and not ours:
            handler(number, sys._getframe())
