"""Protect this project's own web servers: loopback only, a secret for every request, no other host name and no other origin."""

from __future__ import annotations

import hmac
import json
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from posttrain.network import HOST

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


REFUSED = "refused: open the address that the command printed, or send its secret as Authorization: Bearer"


def _refused(_: int) -> bytes:
    return json.dumps({"error": REFUSED}).encode()


class Guard:
    """ASGI middleware. Refuses a wrong Host (DNS rebinding) or Origin with 403, and a wrong token with 401.

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
        status = self._refusal(scope["path"], {k.decode().lower(): v.decode("latin-1") for k, v in scope["headers"]})
        extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        if status is None:
            await self.app(scope, receive, with_headers)
            return
        body = self.refused(status)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, path: str, headers: dict[str, str]) -> int | None:
        """Return the status of a request that is refused, or None."""
        host = headers.get("host")
        if host not in self.hosts or headers.get("origin", f"http://{host}") != f"http://{host}":
            return 403
        if path in self.public:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        return None if hmac.compare_digest(given.encode(), self.token.encode()) else 401


def run(app: ASGIApp, port: int, ready: Callable[[], None]) -> None:
    """Serve an application on loopback until Ctrl-C or SIGTERM; requests in progress are finished first."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn would raise the signal again after it has stopped, and end the process before the caller has cleaned up
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    Server(uvicorn.Config(app, host=HOST, port=port, log_level="warning", access_log=False)).run()
