"""Bounds of time hold whatever the bounded code catches, and leave an outer alarm as it was."""

from __future__ import annotations

import contextlib
import signal
import time

import pytest

from posttrain.data.limits import bounded


def stubborn(catches: int) -> None:
    """Run without end, and catch the first `catches` interruptions."""
    with contextlib.suppress(Exception):
        try:
            while True:
                time.sleep(0.01)
        except BaseException:
            if not catches:
                raise
            stubborn(catches - 1)


@pytest.mark.parametrize("catches", [0, 1, 3])
def test_code_that_catches_every_exception_is_ended(catches: int) -> None:
    with pytest.raises(TimeoutError, match=r"more than 0\.1 s"), bounded(0.1):
        stubborn(catches)


def test_an_error_of_the_code_stays_that_error_and_no_alarm_is_left() -> None:
    outer = signal.getitimer(signal.ITIMER_REAL)[0]
    with pytest.raises(ValueError, match="mine"), bounded(0.2):
        raise ValueError("mine")
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    assert (left > 0) == (outer > 0)
    assert left <= outer
