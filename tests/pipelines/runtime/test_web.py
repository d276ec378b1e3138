"""The guard before our own web servers: its own address and origin, a token, and nothing that it cannot check."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipelines.runtime import web
from pipelines.runtime.web import MOST_BYTES, BodyLimit, Guard
from tests import coroutines

GOOD = {"host": "127.0.0.1:5050", "authorization": "Bearer word"}


def answers(kind: str, path: str, headers: dict[str, str]) -> list[dict[str, Any]]:
    """Return the messages of the guard before an application that answers everything."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    coroutines.run(Guard(app, 5050, "word", ("/",))(scope, receive, send))
    return sent


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/state", GOOD, 200),
        ("/state", GOOD | {"host": "localhost:5050", "origin": "http://localhost:5050"}, 200),
        ("/", {"host": "127.0.0.1:5050"}, 200),
        ("/state", GOOD | {"authorization": "Bearer wörd"}, 401),
        ("/state", GOOD | {"authorization": ""}, 401),
        ("/state/", {"host": "127.0.0.1:5050"}, 401),
        ("/state", GOOD | {"origin": "null"}, 403),
        ("/state", GOOD | {"origin": "https://127.0.0.1:5050"}, 403),
        ("/state", GOOD | {"origin": "http://localhost:5050"}, 403),  # a different server may listen there, on ::1
        ("/state", GOOD | {"origin": "http://127.0.0.1:5051"}, 403),
        ("/state", GOOD | {"Origin": "http://evil.example", "origin": "http://127.0.0.1:5050"}, 403),  # two lines
        ("/state", GOOD | {"content-length": str(MOST_BYTES)}, 200),
        ("/state", GOOD | {"content-length": str(MOST_BYTES + 1)}, 413),
        ("/state", GOOD | {"content-length": "9" * 5000}, 413),
        ("/state", {"host": "127.0.0.1:5050", "content-length": str(MOST_BYTES + 1)}, 401),
        ("/", {"host": "127.0.0.1:5051"}, 403),
        ("/", {"host": "evil.example:5050"}, 403),
        ("/", {}, 403),
    ],
)
def test_a_request_needs_the_servers_own_address_origin_and_token(
    path: str, headers: dict[str, str], status: int
) -> None:
    first = answers("http", path, headers)[0]
    assert first["status"] == status
    assert not [name for name, _ in first["headers"] if name.startswith(b"access-control")]
    assert (b"x-content-type-options", b"nosniff") in first["headers"]


def test_a_body_that_grows_without_end_is_not_read() -> None:
    pieces: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pieces.append(1)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"a" * (MOST_BYTES // 4), "more_body": True}

    scope = {"type": "http", "path": "/", "headers": [(b"host", b"127.0.0.1:5050")]}
    with pytest.raises(HTTPException, match="at most 33554432 bytes"):
        coroutines.run(Guard(app, 5050, "word", ("/",))(scope, receive, receive))
    assert len(pieces) == 4


def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer 408, also in front of a server that reads before it asks; a client that goes away in its body is no error."""
    monkeypatch.setattr(web, "BODY_SECONDS", 0.05)
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async def gone(scope: Any, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    scope = {"type": "http", "path": "/", "headers": [(b"host", b"127.0.0.1:5050")]}
    with pytest.raises(HTTPException, match=r"must arrive within 0\.05 s") as refused:
        coroutines.run(Guard(app, 5050, "word", ("/",))(scope, receive, send))
    assert refused.value.status_code == 408
    coroutines.run(BodyLimit(app, 1000)(scope, receive, send))
    assert sent[0]["status"] == 408
    coroutines.run(Guard(gone, 5050, "word", ("/",))(scope, receive, send))


@pytest.mark.parametrize(
    ("path", "headers", "status", "read"),
    [
        ("/api", [], 413, 5),
        ("/api", [(b"Content-Length", b"41")], 413, 0),
        ("/api", [(b"content-length", b"-1")], 413, 0),
        ("/artifacts/x", [(b"content-length", b"41")], 200, 100),
    ],
)
def test_a_server_that_reads_before_it_asks_has_a_limit(
    path: str, headers: list[tuple[bytes, bytes]], status: int, read: int
) -> None:
    """Send pieces of 10 bytes to an application that collects the whole body, as MLflow's does, with a limit of 40 bytes."""
    pieces: list[int] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def collect() -> None:
            while (await receive())["more_body"]:
                pass

        async with asyncio.TaskGroup() as group:  # puts errors into a group
            group.create_task(collect())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        pieces.append(1)
        return {"type": "http.request", "body": b"a" * 10, "more_body": len(pieces) < 100}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": headers}
    coroutines.run(BodyLimit(app, 40, ("/artifacts/",))(scope, receive, send))
    assert (sent[0]["status"], len(pieces)) == (status, read)


def test_a_web_socket_is_closed_unseen() -> None:
    assert answers("websocket", "/state", GOOD) == [{"type": "websocket.close", "code": 1008}]
