"""Protect this project's own web servers: loopback only, a secret for every request, no other host name and no other origin.

Bodies have a limit, and hold only text and numbers that can be stored and sent again. A refusal names the field, never its content.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.runtime.redaction import printable
from posttrain.network import HOST

if TYPE_CHECKING:
    from fastapi.exceptions import RequestValidationError
    from starlette.types import ASGIApp, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


MOST_BYTES = 32 << 20
"""Largest body of a request."""
KEEP_ALIVE_SECONDS = 75
"""Time after which an idle connection is closed. Clients keep theirs for less: a request on one that is closed first fails."""
BODY_SECONDS = 60.0
"""Longest time for a body to arrive: a request that never ends would keep a server from stopping."""
STOP_SECONDS = 60
"""Longest time for requests in progress once a server is asked to stop: a client may never read its answer."""
REFUSED = "refused: open the address that the command printed, or send its secret as Authorization: Bearer"


class TooLarge(HTTPException):
    """The body of a request is larger than the limit."""

    def __init__(self, most: int) -> None:
        super().__init__(413, f"refused: a request has at most {most} bytes")


class TooSlow(HTTPException):
    """The body of a request did not arrive in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(408, f"refused: the body of a request must arrive within {seconds:g} s")


def refusal_words(status: int) -> str:
    """Return the reason of a refusal by its status."""
    return TooLarge(MOST_BYTES).detail if status == 413 else REFUSED


def _refused(status: int) -> bytes:
    return json.dumps({"error": refusal_words(status)}).encode()


class Body(BaseModel):
    """The body of a request. Lone surrogates, which no UTF-8 file holds, NaN and infinity are refused in all its fields."""

    @model_validator(mode="before")
    @classmethod
    def _is_plain(cls, body: Any) -> Any:
        waiting = [body]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError("a text has half of a surrogate pair, which is no character")
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is NaN or infinite")
        return body


def describe_faults(error: RequestValidationError) -> str:
    """Return the faults of a request by field, without the values that it sent."""
    faults = [(".".join(map(str, each["loc"][1:])) or "body", each["msg"]) for each in error.errors()]
    return printable("; ".join(f"{place}: {fault}" for place, fault in faults))


class Guard:
    """ASGI middleware. Refuses a wrong Host (DNS rebinding) or Origin with 403, a wrong token with 401, a large body with 413.

    The token is sent as `Authorization: Bearer TOKEN`, which no page of a different origin can add. Paths in `public` need none.
    `refused` makes the body, which is JSON, from the status.
    """

    def __init__(
        self,
        app: ASGIApp,
        port: int,
        token: str,
        public: Sequence[str] = (),
        refused: Callable[[int], bytes] = _refused,
    ) -> None:
        self.app, self.token, self.public, self.refused = app, token, frozenset(public), refused
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no application here has web sockets, and their requests are not checked
            await send({"type": "websocket.close", "code": 1008})
            return
        status = self._refusal(scope["path"], [(k.decode().lower(), v.decode("latin-1")) for k, v in scope["headers"]])
        extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        if status is None:
            with suppress(ClientDisconnect):  # the client has gone in the middle of its body; no error of this server
                await self.app(scope, _bounded(receive, MOST_BYTES), with_headers)
            return
        body = self.refused(status)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, path: str, listed: Sequence[tuple[str, str]]) -> int | None:
        """Return the status of a request that is refused, or None."""
        headers = dict(listed)
        host = headers.get("host")
        origins = {value for name, value in listed if name == "origin"}
        if host not in self.hosts or origins - {f"http://{host}"}:
            return 403
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if path not in self.public and not hmac.compare_digest(given.encode(), self.token.encode()):
            return 401
        return 413 if _is_too_long(headers.get("content-length", "0"), MOST_BYTES) else None


class BodyLimit:
    """ASGI middleware. Refuses bodies of more than `most` bytes with 413, for applications that hold a body before they ask for a password.

    Paths that begin with one of `streamed` have no limit.
    """

    def __init__(self, app: ASGIApp, most: int, streamed: Sequence[str] = ()) -> None:
        self.app, self.most, self.streamed = app, most, tuple(streamed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(self.streamed):
            await self.app(scope, receive, send)
            return
        lengths = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"content-length"]
        if any(_is_too_long(length, self.most) for length in lengths):
            await self._refuse(send, TooLarge(self.most))
            return
        started = list[str]()

        async def note(message: Any) -> None:
            started.append(message["type"])
            await send(message)

        try:
            await self.app(scope, _bounded(receive, self.most), note)
        except* (TooLarge, TooSlow) as group:  # layers of the application may have put it into a group
            if not started:
                await self._refuse(send, TooLarge(self.most) if group.subgroup(TooLarge) else TooSlow(BODY_SECONDS))

    async def _refuse(self, send: Send, error: HTTPException) -> None:
        headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": error.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": f"{error.detail}\n".encode()})


def _is_too_long(length: str, most: int) -> bool:
    return not length.isdecimal() or int(length[:20]) > most


def _bounded(receive: Receive, most: int) -> Receive:
    """Return `receive`, which raises TooLarge for a body that grows beyond the limit, and TooSlow for one that does not arrive in time."""
    size, whole = 0, False
    until = asyncio.get_running_loop().time() + BODY_SECONDS

    async def limited() -> Any:
        nonlocal size, whole
        if whole:  # an application waits here for the client to go, as long as its answer takes
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise TooSlow(BODY_SECONDS) from None
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > most:
            raise TooLarge(most)
        return message

    return limited


def run(app: ASGIApp, port: int, ready: Callable[[], None]) -> None:
    """Serve an application on loopback until Ctrl-C or SIGTERM; requests in progress have STOP_SECONDS to finish."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn would raise the signal again after it has stopped, and end the process before the caller has cleaned up
            self.force_exit = self.should_exit and sig == signal.SIGINT
            if self.force_exit:  # uvicorn would log the traceback of a task that it cancelled
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            self.should_exit = True

    config = uvicorn.Config(
        app,
        host=HOST,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    Server(config).run()
