"""The labelling page's server: a fixed page, and four requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import Field
from starlette.types import ASGIApp

from pipelines.labelling.judgements import Desk
from pipelines.runtime.redaction import printable
from pipelines.runtime.web import Body, Guard, describe_faults
from posttrain.errors import DataError, PosttrainError

PAGE = Path(__file__).parent / "page"
STYLE = Path(__file__).parents[1] / "report" / "templates" / "style.css"
FILES = {
    "/": (PAGE / "index.html", "text/html"),
    "/label.js": (PAGE / "label.js", "text/javascript"),
    "/label.css": (PAGE / "label.css", "text/css"),
    "/style.css": (STYLE, "text/css"),
}
"""The page holds no data, so it needs no token; it sends the token of its address with every request."""


class Given(Body):
    """A judgement as the page sends it; `value` is by places."""

    annotator: str
    task: str
    key: str = Field(min_length=1, max_length=100)
    value: Any


class Who(Body):
    annotator: str


def application(desk: Desk, hand_over: Callable[[str | None], int], port: int, token: str) -> ASGIApp:
    """Return the application. `hand_over` puts fresh judgements of one annotator into the inbox, or of all for None, and returns how many.

    An annotator who ends hands over only his own: the others can still undo theirs. The end of the server hands over everyone's.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        hand_over(None)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for path, (file, kind) in FILES.items():
        app.add_api_route(path, _sender(file, kind), methods=["GET"])

    @app.exception_handler(PosttrainError)
    def refuse(_: Request, error: PosttrainError) -> JSONResponse:
        return JSONResponse({"error": printable(str(error))}, 422 if isinstance(error, DataError) else 507)

    @app.exception_handler(RequestValidationError)
    def refuse_body(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": describe_faults(error)}, 422)

    @app.exception_handler(OSError)
    def not_stored(_: Request, error: OSError) -> JSONResponse:
        return JSONResponse({"error": f"not stored: {error.strerror}. The page tries again."}, 507)

    @app.post("/state")
    def state(who: Who) -> dict[str, Any]:
        return desk.state(who.annotator)

    @app.post("/judge")
    def judge(given: Given) -> dict[str, Any]:
        desk.judge(given.annotator, given.task, given.key, given.value)
        if desk.is_finished(given.annotator):
            hand_over(given.annotator)
        return desk.state(given.annotator)

    @app.post("/undo")
    def undo(who: Who) -> dict[str, Any]:
        desk.undo(who.annotator)
        return desk.state(who.annotator)

    @app.post("/finish")
    def finish(who: Who) -> dict[str, Any]:
        return {"handed": hand_over(who.annotator)} | desk.state(who.annotator)

    return Guard(app, port, token, tuple(FILES))


def _sender(file: Path, kind: str) -> Callable[[], FileResponse]:
    return lambda: FileResponse(file, media_type=kind)
