"""Several servers in turn: where one is lost the others take over, and where all are, it waits for one to come back, within bounds."""

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
from posttrain.rollouts.vllm.server import Server

T = TypeVar("T")
IN_FLIGHT = 64
"""Requests that one server is given at once."""
REVIVALS = 3
"""Times that a round of requests goes on after all servers were lost."""


class Fleet:
    """`ready` makes a server serve the policy's weights of now and proves it; it raises ServerError where that server cannot."""

    def __init__(self, servers: Sequence[Server], ready: Callable[[Server], None], patience_seconds: float) -> None:
        self.servers, self.ready, self.patience_seconds = list(servers), ready, patience_seconds
        self.lost: dict[Server, ServerError] = {}
        self._readied: Counter[Server] = Counter()
        self._lock = Lock()
        self._stop = Event()

    @property
    def living(self) -> list[Server]:
        return [server for server in self.servers if server not in self.lost]

    def prepare(self) -> None:
        """Make every server ready, those that were lost too; one that cannot is left out. Raises ServerError when none can."""
        for server in self.servers:
            self._try(server)
        if not self.living:
            self._revive()

    def run(self, jobs: Sequence[Callable[[Server], T]]) -> list[T]:
        """What each job returns, in order. A job whose server is lost is given to another. Raises what a job raises."""
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

    def _run_one(self, job: Callable[[Server], T], number: int, revivals: list[int]) -> T:
        while True:
            server, life = self._choose(number, revivals)
            try:
                return job(server)
            except ServerError as error:
                self._lose(server, life, error)

    def _choose(self, number: int, revivals: list[int]) -> tuple[Server, int]:
        """The servers in turn, each with the number of its life. One thread revives them while the others wait for it."""
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

    def _lose(self, server: Server, life: int, error: ServerError) -> None:
        """A request that began in an earlier life says nothing of this one."""
        with self._lock:
            if server not in self.lost and self._readied[server] == life and not self._stop.is_set():
                self.lost[server] = error
                tqdm.write(f"{error}; {len(self.living)} of {len(self.servers)} vLLM servers go on", file=sys.stderr)

    def _revive(self) -> None:
        """Ask in turn, a second apart, until one is ready."""
        deadline = time.monotonic() + self.patience_seconds
        while True:
            for server in self.servers:
                if self._try(server):
                    return
            if time.monotonic() > deadline or self._stop.wait(1.0):
                raise self._none_left()

    def _try(self, server: Server) -> bool:
        try:
            self.ready(server)
        except ServerError as error:
            self.lost[server] = error
            return False
        self.lost.pop(server, None)
        self._readied[server] += 1
        return True

    def _none_left(self) -> ServerError:
        reasons = "; ".join(str(error) for error in self.lost.values()) or "the run is being stopped"
        return ServerError(
            f"no vLLM server is left ({reasons}). Start them again, then run the same command: it goes on from its last checkpoint."
        )
