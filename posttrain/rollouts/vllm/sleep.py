"""Let servers on the trainer's GPU sleep while it trains, and prove that their memory is free.

vLLM's CPU build answers a request to sleep with success and keeps its memory, so the memory is measured.

    >>> sleep = Sleep(free=lambda: 2**30, weights=2**20)
    >>> sleep.begin([])  # no server sleeps, so no memory must become free
    >>> sleep.freed, sleep.asleep
    (0, set())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from posttrain.errors import RolloutError, ServerError
from posttrain.rollouts.vllm.server import SLEEPLESS, VllmServer

SHARE = 0.9
"""Share of the weights' bytes that must be free after all servers began to sleep; other processes may claim some meanwhile."""


class Sleep:
    """The servers' sleep.

    Args:
        free: returns the free bytes of the device that trainer and servers share.
        weights: bytes of the weights on each server; at least those must become free.
        give_back: called before servers wake, so that the trainer returns memory that it does not use.
    """

    def __init__(self, free: Callable[[], int], weights: int, give_back: Callable[[], None] = lambda: None) -> None:
        self.free, self.weights, self.give_back = free, weights, give_back
        self.asleep: set[VllmServer] = set()
        self.freed = 0

    def begin(self, servers: Sequence[VllmServer]) -> None:
        """Let servers sleep.

        One that does not answer is left: its next use will report it.

        Raises:
            RolloutError: one cannot, or keeps its memory.
        """
        before = self.free()
        for server in servers:
            with suppress(ServerError):
                server.sleep()
                self.asleep.add(server)
        self.freed = self.free() - before
        expected = self.weights * len(self.asleep)
        if self.freed < SHARE * expected:
            raise RolloutError(
                f"{', '.join(server.url for server in servers)}: asleep, but the device has only {max(0, self.freed) / 2**20:.0f} MiB more"
                f" free memory than before, and the weights take {expected / 2**20:.0f} MiB; {SLEEPLESS}"
            )

    def end(self, server: VllmServer, part: str) -> None:
        """Let a sleeping server claim the memory of `weights` or `kv_cache`."""
        if server not in self.asleep:
            return
        self.give_back()
        try:
            server.wake(part)
        except ServerError:  # it has ended; its next start is awake
            part = "kv_cache"
        if part == "kv_cache":
            self.asleep.discard(server)
