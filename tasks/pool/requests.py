"""Requests to Prefect's server that are repeated while it is busy or away, as during its restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import SettingsContext, get_settings_context

from pipelines.runtime.redaction import redact
from posttrain.errors import Interrupted, OrchestrationError

T = TypeVar("T")
RETRY_SECONDS = (0.05, 2.0)
"""Waiting times before a request is repeated: the first one, which doubles, and the longest one while the server is away."""
BUSY_SECONDS = 0.2
"""The longest waiting time while the server responds that it is busy."""
BUSY = (408, 429, 502, 503)
"""Status codes after which Prefect's own client waits and repeats."""


class ServerAway(OrchestrationError):
    """Prefect's server did not respond for as long as a request is repeated."""


@contextmanager
def own_retries() -> Iterator[None]:
    """Leave repeating requests to `insist`, in this thread; see `prefect_client`."""
    context = get_settings_context()
    client = context.settings.client.model_copy(update={"max_retries": 0})
    with SettingsContext(profile=context.profile, settings=context.settings.model_copy(update={"client": client})):
        yield


@contextmanager
def prefect_client(timeout_seconds: float) -> Iterator[SyncPrefectClient]:
    """Open a client of Prefect's server whose requests `insist` repeats, within `own_retries`.

    Over SQLite the server refuses one of two requests that write at once (503). Prefect's client waits two seconds and more after each
    such response, even with `max_retries` 0, so the response becomes an error before the client sees it.
    """
    settings = {"timeout": timeout_seconds, "event_hooks": {"response": [_raise_if_busy]}}
    with get_client(httpx_settings=settings, sync_client=True) as client:
        yield client


def _raise_if_busy(response: httpx.Response) -> None:
    """Raise httpx.HTTPStatusError if the same request may succeed later."""
    if response.status_code in BUSY:
        response.read()
        response.raise_for_status()


def insist(act: Callable[[], T], seconds: float, stop: threading.Event | None = None) -> T:
    """Repeat a request to Prefect's server while it does not respond, as during its restart.

    Raises ServerAway after `seconds`, Interrupted once `stop` is set, or OrchestrationError if the server refuses the request.
    """
    deadline, (pause, longest) = time.monotonic() + seconds, RETRY_SECONDS
    while True:
        try:
            return act()
        except httpx.HTTPError as error:
            if _is_refusal(error):
                raise OrchestrationError(f"Prefect's server refused a request: {redact(str(error))}") from None
            if time.monotonic() > deadline:
                raise ServerAway(
                    f"Prefect's server did not respond for {seconds:.0f} s: {redact(str(error))}. Start it, then run again: finished stages"
                    " are kept."
                ) from None
            away = not isinstance(error, httpx.HTTPStatusError)
        if stop is None:
            time.sleep(pause)
        elif stop.wait(pause):
            raise Interrupted("stopped while Prefect's server did not respond")
        pause = min(2 * pause, longest if away else BUSY_SECONDS)


def _is_refusal(error: httpx.HTTPError) -> bool:
    """Return True if the same request would be refused again."""
    return (
        isinstance(error, httpx.HTTPStatusError)
        and error.response.status_code < 500
        and error.response.status_code not in BUSY
    )
