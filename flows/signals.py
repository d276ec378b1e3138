"""Stop a flow on Ctrl-C, TERM or *Cancel* in Prefect: its stages stop cleanly, then the flow ends Cancelled."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import NoReturn
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from pipelines.runtime.process import stopping_signals
from tasks.background import in_background

POLL_SECONDS = 2.0


def raise_interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt. Used before and after the stages, so that everything that was started is stopped."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def stop_on_signal(stop: Event) -> Iterator[list[str]]:
    """Set `stop` on a signal or a cancellation in Prefect; yields the list of received signals."""
    received: list[str] = []
    with _on_signal(stop, received), _on_cancellation(stop):
        yield received


def reason(received: list[str]) -> str:
    """Return why the flow stops. A worker forwards a person's *Cancel* as a signal, so cancellation is checked first."""
    identity = flow_run.get_id()
    with _own_client() as client:
        if identity is not None and _is_cancelled(client, UUID(identity)):
            return "cancelled in Prefect"
    # Without a signal, only a cancellation can have stopped it, even if the server no longer responds.
    return f"stopped by {received[0]}" if received else "cancelled in Prefect"


@contextmanager
def _on_signal(stop: Event, received: list[str]) -> Iterator[None]:
    """Record signals and set `stop` while inside; only the main thread can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def record(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        stop.set()

    before = {number: signal.signal(number, record) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _on_cancellation(stop: Event) -> Iterator[None]:
    """Poll Prefect for a cancellation: a flow started in a terminal has no worker that would send a signal."""
    identity = flow_run.get_id()
    if identity is None:
        yield
        return
    client = _own_client()
    with in_background(lambda over: _ask(client, UUID(identity), stop, over)):
        yield


def _ask(client: SyncPrefectClient, identity: UUID, stop: Event, over: Event) -> None:
    """Poll the flow run's state until it is cancelled or the flow is over."""
    with client:
        while not over.wait(POLL_SECONDS):
            if _is_cancelled(client, identity):
                stop.set()
                return


def _is_cancelled(client: SyncPrefectClient, identity: UUID) -> bool:
    """Return True if Prefect reports the flow run as cancelled."""
    try:
        state = client.read_flow_run(identity).state
    except (httpx.HTTPError, ObjectNotFound):  # The server is down; the flow's own requests report that.
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def _own_client() -> SyncPrefectClient:
    """Return a client of this thread. Different settings keep Prefect from returning the flow's client, which threads must not share."""
    return get_client(httpx_settings={"timeout": 10.0}, sync_client=True)
