"""Notice a hung server by its own counters of tokens, long before a request's time limit.

Example:
    >>> text = '# HELP vllm:generation_tokens_total ...\\nvllm:generation_tokens_total{model="policy"} 41.0\\n'
    >>> tokens_counted(text + 'vllm:prompt_tokens_total{model="policy"} 7.0\\n'), tokens_counted("null"), tokens_counted(text + COUNTERS[0])
    (48.0, None, None)
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from socket import socket

COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
LOOK_SECONDS = 5.0
"""Time between two looks at the counters of a server that has not answered yet, and the longest that it may take to show them."""
STALL_SECONDS = 20.0
"""A server whose counters have not changed for so long is considered hung: longer than a step of any server that is worth waiting for."""


def tokens_counted(metrics: str) -> float | None:
    """Return the number of tokens that the server has read and made, from its page `/metrics`; None if it counts none, or no number."""
    lines = [line for line in metrics.splitlines() if line.startswith(COUNTERS)]
    try:
        counted = sum(float(line.rpartition(" ")[2]) for line in lines)
    except ValueError:
        return None
    return counted if lines and math.isfinite(counted) else None


def wait_for_reply(
    connection: socket,
    count: Callable[[], float | None],
    look_seconds: float,
    seconds: float,
    stall_seconds: float = STALL_SECONDS,
) -> bool:
    """Wait until a reply can be read. Return False if the server has hung.

    Args:
        count: returns the server's counter of tokens, or None if it has none; then only `seconds` limits the wait.
        seconds: longest wait.
        stall_seconds: longest time between two values of the counter.
    """
    before, changed, deadline = None, time.monotonic(), time.monotonic() + seconds
    while not select.select([connection], [], [], min(look_seconds, max(0.0, deadline - time.monotonic())))[0]:
        now = count()
        if now is None or now != before:
            before, changed = now, time.monotonic()
        if time.monotonic() >= deadline or time.monotonic() - changed >= stall_seconds:
            return False
    return True
