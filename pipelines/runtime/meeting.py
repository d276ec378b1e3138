"""Let the processes of several hosts meet before they connect: if one fails at its start, the others end with its reason.

They leave a few keys in the store of torch.distributed through which they connect afterwards. On one host the launcher ends the others.

Example:
    A step that runs as one process has nothing to wait for:

    >>> meet(seconds=1.0)
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from pipelines.runtime import launch
from posttrain.errors import OrchestrationError, PosttrainError
from posttrain.network import is_listening, wait_until

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS, QUIET_SECONDS, REPORT_SECONDS = 0.2, 10.0, 10.0
"""Time between two looks, until stderr names whom a process waits for, and in which one that failed tries to reach the others."""
FAILED = "failed"
HEARD = "a process of this stage has failed at its start"
_MET = [False]


@dataclass(frozen=True)
class Place:
    """A process among those of all hosts, and the address of their store, which rank 0 opens unless its launcher has."""

    rank: int
    world: int
    host: str
    port: int
    opens: bool


def meet(seconds: float, place: Place | None = None) -> None:
    """Wait until the processes of all hosts have come.

    Raises:
        OrchestrationError: one has failed, or has not come within `seconds`.
    """
    place = place or _own_place()
    if place is None:
        return
    deadline = time.monotonic() + seconds
    try:
        store = _store(place, deadline)
        store.set(f"{place.rank}", "")
        _wait(deadline, lambda: _missing(store, place, ""))
        # the store may end with rank 0, which therefore goes on last
        store.set(f"{place.rank} goes on", "")
        if place.rank == 0:
            _wait(deadline, lambda: _missing(store, place, " goes on"))
    except RuntimeError as error:
        raise OrchestrationError(
            f"rank 0 at {place.host}:{place.port} has ended before all {place.world} processes had met"
            f" ({str(error).splitlines()[0]}): its output has the reason. Mend it, and start all hosts again"
        ) from error
    _MET[0] = True


def report(reason: str) -> None:
    """Give the processes of the other hosts the reason for which this one ends, if they still wait for it."""
    place = _own_place()
    if place is not None and not _MET[0] and not reason.startswith(HEARD):
        tell(place, f"process {place.rank} on {socket.gethostname()}: {reason}")


def tell(place: Place, words: str) -> None:
    """Leave words for the processes that wait, which end with them; nothing if they cannot be reached.

    The store ends with rank 0 or its launcher, so rank 0 stays until the others have heard, also if a different process has failed.
    """
    with suppress(PosttrainError, RuntimeError, OSError):
        store = _store(place, time.monotonic() + REPORT_SECONDS)
        store.set(f"{place.rank} heard", "")
        store.set(FAILED, words)
        _stay(store, place)


def _stay(store: Store, place: Place) -> None:
    """Wait on rank 0 until the others have heard, or for REPORT_SECONDS."""
    others = range(1, place.world if place.rank == 0 else 1)
    with suppress(RuntimeError):  # a launcher's store has ended
        wait_until(lambda: all(store.check([f"{rank} heard"]) for rank in others), lambda: True, REPORT_SECONDS)


def _own_place() -> Place | None:
    """Return this process's place as its launcher has set it; None if all processes are on one host."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) >= world:
        return None
    opens = launch.process() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Place(launch.process(), world, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), opens)


def _missing(store: Store, place: Place, suffix: str) -> str:
    """Return in words which processes have not come; empty if all have. Raises OrchestrationError if one has failed."""
    if store.check([FAILED]):
        words = store.get(FAILED).decode()
        store.set(f"{place.rank} heard", "")
        _stay(store, place)
        raise OrchestrationError(f"{HEARD}, so this one cannot go on. {words}")
    ranks = [str(rank) for rank in range(place.world) if not store.check([f"{rank}{suffix}"])]
    return f"process {', '.join(ranks)} of {place.world}" if ranks else ""


def _store(place: Place, deadline: float) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    host, port = place.host, place.port
    if not place.opens:
        _wait(deadline, lambda: "" if is_listening(host, port) else f"rank 0 at {host}:{port}")
    left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    # torch.distributed opens it again in this process
    made = TCPStore(host, port, None, place.opens, left, wait_for_workers=False, multi_tenant=True)
    return PrefixStore("posttrain", made)


def _wait(deadline: float, missing: Callable[[], str]) -> None:
    """Wait until the words for those that are missing are empty. If that takes long, stderr has them once."""
    began, said = time.monotonic(), False
    while absent := missing():
        seconds = time.monotonic() - began
        if time.monotonic() > deadline:
            raise OrchestrationError(
                f"{absent} has not come within {seconds:.0f} s: look at its output, mend its fault, and start all hosts again"
            )
        if not said and seconds > QUIET_SECONDS:
            print(f"waiting for {absent}", file=sys.stderr, flush=True)
            said = True
        time.sleep(POLL_SECONDS)
