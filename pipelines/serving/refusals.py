"""Requests that cannot be answered, in the form of OpenAI's errors: `{"error": {"message", "type", "param", "code"}}`.

Example:
    >>> Refusal("the request has no model", "model").body()
    {'error': {'message': 'the request has no model', 'type': 'invalid_request_error', 'param': 'model', 'code': None}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from pipelines.runtime.redaction import printable, redact

Wanted = TypeVar("Wanted", bound=BaseModel)
INVALID, FAILED = "invalid_request_error", "server_error"
LARGEST_BYTES = 32 * 2**20
_SHOWN = 80


@dataclass(frozen=True)
class Refusal:
    """A refused request.

    Attributes:
        param: the field at fault, such as `messages[0].content`; None if there is no single one.
        code: a word for programs, such as `model_not_found`.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400

    @property
    def kind(self) -> str:
        """Return OpenAI's `type` of the error."""
        return FAILED if self.status >= 500 else INVALID

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        shown = _encodable(printable(redact(self.message)))
        param = None if self.param is None else _encodable(printable(self.param))
        return {"error": {"message": shown, "type": self.kind, "param": param, "code": self.code}}

    def encoded(self) -> bytes:
        """Return the body as bytes."""
        return json.dumps(self.body()).encode()

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status)


def read(kind: type[Wanted], body: bytes) -> Wanted | Refusal:
    """Return the request in a body, or its refusal."""
    if len(body) > LARGEST_BYTES:
        return Refusal(f"the request has {len(body)} bytes; at most {LARGEST_BYTES} are read", status=413)
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Refusal(f"the body is no JSON: {error}")
    if not isinstance(tree, dict):
        return Refusal("the body must be a JSON object")
    problem = next(_unusable(tree), None)
    if problem is not None:
        return problem
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # of a field with several types, the error inside the given one is more useful than that it is not the first type
        errors = error.errors(include_url=False, include_context=False)
        found = min(
            errors, key=lambda each: each["type"].endswith("_type") and each["input"] is tree.get(str(each["loc"][0]))
        )
        given = "" if found["type"] == "missing" else f", and is {json.dumps(found['input'])[:_SHOWN]}"
        param = _field(kind, found["loc"])
        return Refusal(f"{param}: {found['msg'].removeprefix('Value error, ')}{given}", param)


def _unusable(tree: dict[str, Any]) -> Iterator[Refusal]:
    """Yield a refusal for each value that JSON does not have, or no tokenizer can read: NaN, infinity, half of a surrogate pair."""
    waiting: list[tuple[str, Any]] = list(tree.items())
    for name in tree:
        if not _is_text(name):
            yield Refusal("the name of a field has half of a surrogate pair, which is no text")
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield Refusal(f"{name} = {value} is no number of JSON", name)
        elif isinstance(value, str) and not _is_text(value):
            yield Refusal(f"{name} has half of a surrogate pair, which is no text; send whole characters", name)
        elif isinstance(value, dict):
            waiting += [(name, each) for pair in value.items() for each in pair]
        elif isinstance(value, list):
            waiting += [(name, each) for each in value]


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _field(kind: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """Return the place of an error as a path. Names of alternative types are left out."""
    path = str(place[0])
    for step in place[1:]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in ("role", "content", "include_usage", "include_obfuscation"):
            path += f".{step}"
    return path
