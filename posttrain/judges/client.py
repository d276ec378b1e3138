"""One request to an OpenAI-compatible server of chat completions, with a bounded number of tries and bounded time.

Example:
    >>> ChatClient("127.0.0.1:8000/v1", "champion")
    Traceback (most recent call last):
    posttrain.errors.ConfigError: '127.0.0.1:8000/v1' is not the address of a server; write e.g. http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import ConfigError, JudgeError, JudgeTimeoutError
from posttrain.network import shut_after

URL, API_KEY = "POSTTRAIN_JUDGE_URL", "POSTTRAIN_JUDGE_API_KEY"
"""Variables with the judge's address and secret."""
Message = Mapping[str, str]
WAITS_SECONDS = (0.5, 2.0, 8.0)
"""Time before the second, third and fourth try, unless the server names one."""
LONGEST_WAIT_SECONDS = 60.0
BUSY = (408, 409, 429)
"""Statuses, next to 5xx, after which the same request may succeed."""
LONGEST_REPLY_BYTES = 4 * 2**20
MOST_TOKENS = 10**8
"""A reply whose usage is above this, or negative, counts as one of unknown length."""


@dataclass(frozen=True)
class Reply:
    """A model's text, and the tokens that the server counted for it; 0 if it does not count."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ChatClient:
    """A model behind a URL. Thread-safe.

    Attributes:
        url: base address with its version, e.g. http://127.0.0.1:8000/v1.
        model: name of the model at the server.
        key: secret sent as bearer token; never part of an error or of the cache.
        timeout_seconds: limit of one try.
        temperature: 0 is greedy; with `seed`, most servers repeat an answer.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    timeout_seconds: float = 60.0
    waits_seconds: tuple[float, ...] = WAITS_SECONDS

    def __post_init__(self) -> None:
        """Raise ConfigError if the URL is not one."""
        if "@" in self.url.partition("//")[2].partition("/")[0]:
            raise ConfigError("the judge's address holds a user name or password; give the secret as its key instead")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # a port that is no number, or a bracket that stays open
            usable = False
        if not usable or not self.url.isprintable() or " " in self.url:
            raise ConfigError(f"{self.url!r} is not the address of a server; write e.g. http://127.0.0.1:8000/v1")

    def body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Return the request. Two requests with the same body ask the same question."""
        return {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def complete(self, messages: Sequence[Message]) -> Reply:
        """Return the model's reply. Raises JudgeError as `post` does."""
        return self.post(self.body(messages))

    def post(self, body: Mapping[str, Any], until: float = math.inf) -> Reply:
        """Send a request until it succeeds.

        Args:
            until: time of the monotonic clock at which all tries end, in seconds.

        Raises:
            JudgeTimeoutError: no try had succeeded by then.
            JudgeError: no try succeeded, or the server refused the request. Redirects are refused: they would carry the key elsewhere.
        """
        for wait in (*self.waits_seconds, None):
            left = until - time.monotonic()
            if left <= 0:
                raise JudgeTimeoutError(f"{self.url} did not answer within the time limit")
            try:
                return self._try(body, min(self.timeout_seconds, left))
            except _Again as error:
                if wait is None:
                    tries = len(self.waits_seconds) + 1
                    raise JudgeError(f"{self.url} failed {tries} times: {error}. Is the server running?") from error
                pause = min(LONGEST_WAIT_SECONDS, wait if error.after is None else error.after)
                time.sleep(max(0.0, min(pause, until - time.monotonic())))
        raise AssertionError("the last try returns or raises")

    def _try(self, body: Mapping[str, Any], seconds: float) -> Reply:
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(parts.netloc, timeout=seconds)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            with shut_after(connection, seconds):
                connection.request(
                    "POST", f"{parts.path.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
                )
                response = connection.getresponse()
                data, status = response.read(LONGEST_REPLY_BYTES), response.status
                after = response.getheader("Retry-After", "")
        except (OSError, HTTPException) as error:
            raise _Again(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        shown = data[:300].decode(errors="replace")
        if status >= 500 or status in BUSY:
            raise _Again(f"status {status}: {shown}", float(after) if after.isascii() and after.isdigit() else None)
        if status != 200:
            raise JudgeError(f"{self.url} refused the request with status {status}: {shown}")
        return _reply(data, self.url, shown)


class _Again(Exception):
    """A try failed in a way that may pass; `after` is the server's wish in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def _reply(data: bytes, url: str, shown: str) -> Reply:
    """Return the text and the usage of a response. Raises JudgeError if it has a different form."""
    try:
        answer = json.loads(data)
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        counted = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        counted = [number if 0 <= number <= MOST_TOKENS else 0 for number in counted]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise JudgeError(f"{url} sent no chat completion: {shown}") from error
    return Reply(text if isinstance(text, str) else "", *counted)
