"""Several servers in turn. If one is lost, the others take over; if all are lost, wait a limited time for one to come back.

Example:
    >>> fleet = Fleet([VllmServer("http://127.0.0.1:8001")], ready=lambda server: None, patience_seconds=0)
    >>> fleet.prepare()
    >>> fleet.run([lambda server: server.url] * 2)
    ['http://127.0.0.1:8001', 'http://127.0.0.1:8001']
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TypeVar

from tqdm import tqdm

from posttrain.errors import ServerError
from posttrain.rollouts.vllm.server import VllmServer

T = TypeVar("T")
IN_FLIGHT = 64
"""Most open requests per server."""
FIRST_PATIENCE_SECONDS = 5.0
"""How long to wait if no server has answered in this run yet: their addresses may be wrong, or they were not started."""
REVIVALS = 3
"""How often a round of requests continues after all servers were lost."""


class Fleet:
    """Servers that share the requests.

    Args:
        ready: makes a server use the policy's current weights and verifies it; raises ServerError if the server cannot.
    """

    def __init__(
        self, servers: Sequence[VllmServer], ready: Callable[[VllmServer], None], patience_seconds: float
    ) -> None:
        self.servers, self.ready, self.patience_seconds = list(servers), ready, patience_seconds
        self.lost: dict[VllmServer, ServerError] = {}
        self.met = False
        """Whether a server has been ready before, and so may come back."""
        self._readied: Counter[VllmServer] = Counter()
        self._lock = Lock()
        self._stop = Event()

    @property
    def living(self) -> list[VllmServer]:
        return [server for server in self.servers if server not in self.lost]

    def prepare(self) -> None:
        """Make every server ready, also lost ones; a server that fails is excluded.

        Raises:
            ServerError: no server is ready.
        """
        for server in self.servers:
            self._try(server)
        if not self.living:
            self._revive()

    def run(self, jobs: Sequence[Callable[[VllmServer], T]]) -> list[T]:
        """Return the result of each job, in order. If a job's server is lost, a different one gets it. A job's own exception is raised."""
        revivals = [REVIVALS]
        with ThreadPoolExecutor(max(1, min(len(jobs), IN_FLIGHT * len(self.servers)))) as pool:
            futures = [pool.submit(self._run_one, job, number, revivals) for number, job in enumerate(jobs)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                self.close()
                raise

    def close(self) -> None:
        self._stop.set()
        for server in self.servers:
            server.close()

    def _run_one(self, job: Callable[[VllmServer], T], number: int, revivals: list[int]) -> T:
        while True:
            server, life = self._choose(number, revivals)
            try:
                return job(server)
            except ServerError as error:
                self._lose(server, life, error)

    def _choose(self, number: int, revivals: list[int]) -> tuple[VllmServer, int]:
        """Return the servers in turn, each with the number of its life. One thread revives them while the others wait for it."""
        with self._lock:
            if self._stop.is_set():
                raise self._none_left()
            if not self.living:
                if not revivals[0]:
                    raise self._none_left()
                revivals[0] -= 1
                self._revive()
            chosen = self.living[number % len(self.living)]
            return chosen, self._readied[chosen]

    def _lose(self, server: VllmServer, life: int, error: ServerError) -> None:
        """Mark a server as lost, unless the request began in an earlier life of it."""
        with self._lock:
            if server not in self.lost and self._readied[server] == life and not self._stop.is_set():
                self.lost[server] = error
                tqdm.write(f"{error}; {len(self.living)} of {len(self.servers)} vLLM servers continue", file=sys.stderr)

    def _revive(self) -> None:
        """Try all servers in turn, one second apart, until one is ready. Report at once that none is.

        Raises:
            ServerError: none is ready in time. A server that was ready before may take `patience_seconds` to come back.
        """
        seconds = self.patience_seconds if self.met else min(self.patience_seconds, FIRST_PATIENCE_SECONDS)
        deadline = time.monotonic() + seconds
        if seconds:
            reasons = "; ".join(str(error) for error in self.lost.values())
            tqdm.write(f"no vLLM server is left ({reasons}); waiting up to {seconds:g} s for one", file=sys.stderr)
        while True:
            for server in self.servers:
                if self._try(server):
                    return
            if time.monotonic() > deadline or self._stop.wait(1.0):
                raise self._none_left()

    def _try(self, server: VllmServer) -> bool:
        try:
            self.ready(server)
        except ServerError as error:
            self.lost[server] = error
            return False
        self.lost.pop(server, None)
        self._readied[server] += 1
        self.met = True
        return True

    def _none_left(self) -> ServerError:
        reasons = "; ".join(str(error) for error in self.lost.values()) or "the run is stopping"
        return ServerError(
            f"no vLLM server is left ({reasons}). Start them again, then run the same command: it resumes from its last checkpoint."
        )
