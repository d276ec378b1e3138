"""What ends a flow from outside: Ctrl-C, TERM, or *Cancel* in Prefect. Its stages are stopped cleanly, then it ends Cancelled."""

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

NUMBERS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 2.0


def raise_interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """For the time before and after the stages: unwind, so that whatever was started is stopped."""
    raise KeyboardInterrupt(signal.Signals(number).name)


@contextmanager
def stop_on_signal(stop: Event) -> Iterator[list[str]]:
    """While inside, a signal or a cancellation in Prefect sets `stop`; yields the signals that came."""
    received: list[str] = []
    with _on_signal(stop, received), _on_cancellation(stop):
        yield received


def reason(received: list[str]) -> str:
    """Why the flow stops. A worker hands a person's *Cancel* on as a signal, which then is not the reason."""
    identity = flow_run.get_id()
    with _own_client() as client:
        if identity is not None and _is_cancelled(client, UUID(identity)):
            return "cancelled in Prefect"
    # without a signal only a cancellation can have stopped it, also where the server no longer answers
    return f"stopped by {received[0]}" if received else "cancelled in Prefect"


@contextmanager
def _on_signal(stop: Event, received: list[str]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heed(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        stop.set()

    before = {number: signal.signal(number, heed) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _on_cancellation(stop: Event) -> Iterator[None]:
    """A flow that was typed in a terminal has no worker above it to send a signal, so it asks."""
    identity = flow_run.get_id()
    if identity is None:
        yield
        return
    over = Event()
    thread = threading.Thread(target=_ask, args=(_own_client(), UUID(identity), stop, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ask(client: SyncPrefectClient, identity: UUID, stop: Event, over: Event) -> None:
    with client:
        while not over.wait(POLL_SECONDS):
            if _is_cancelled(client, identity):
                stop.set()
                return


def _is_cancelled(client: SyncPrefectClient, identity: UUID) -> bool:
    try:
        state = client.read_flow_run(identity).state
    except (httpx.HTTPError, ObjectNotFound):  # the server is away; the flow's own requests say so when they give up
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


def _own_client() -> SyncPrefectClient:
    """Settings of its own make it another client than the flow's, which is not shared between threads."""
    return get_client(httpx_settings={"timeout": 10.0}, sync_client=True)
