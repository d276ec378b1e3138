"""Ask a model behind an OpenAI-compatible URL many questions: in parallel, within a time limit, each one once.

The address is no parameter, because it does not decide the answer: POSTTRAIN_JUDGE_URL, and POSTTRAIN_JUDGE_API_KEY if the server wants a
key. Answers are kept in a folder by the hash of model, messages and settings, so a repeated or resumed run asks nothing twice and gets the
same answers. If a different model takes over a name, delete the folder.

Example:
    >>> body("tiny", "2+2?", max_tokens=4)["messages"]
    [{'role': 'user', 'content': '2+2?'}]
    >>> key(body("tiny", "2+2?", 4)) == key(body("tiny", "2+2?", 4)) != key(body("tiny", "2+3?", 4))
    True
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.errors import ConfigError, RewardError, RewardTimeoutError

URL, API_KEY, CONCURRENCY = "POSTTRAIN_JUDGE_URL", "POSTTRAIN_JUDGE_API_KEY", "POSTTRAIN_JUDGE_CONCURRENCY"
PRICES = "POSTTRAIN_JUDGE_PRICES"
TOKENS = ("prompt_tokens", "completion_tokens")
FOLDER = Path(".posttrain/judge")
ATTEMPTS = 4
"""Requests for one answer; a server that is busy (429) or failing (5xx) is asked again."""
PAUSE_SECONDS = 0.5
"""Before the second request; doubled before each later one."""
_RETRIED = (408, 409, 425, 429)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: they would carry the key to a different server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class JudgeServer:
    """A judge at a URL.

    Attributes:
        url: up to and including `/v1`.
        concurrency: most requests at the same time.
        folder: of kept answers; None keeps none.
        prices: of a million prompt tokens and of a million completion tokens; () if unknown.
        usage: different `questions`, and the tokens of their answers as the server counts them, kept answers included:
            `prompt_tokens`, `completion_tokens`. These do not depend on which answers were kept.
        paid: this process's `questions` and `requests`, and the tokens of those requests, from the start.
    """

    url: str
    api_key: str = ""
    concurrency: int = 8
    folder: Path | None = FOLDER
    prices: tuple[float, ...] = ()
    usage: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ConfigError(f"{URL} = {self.url!r}: not an address; give one such as http://127.0.0.1:8000/v1")
        self.url = self.url.rstrip("/")
        self._open = urllib.request.build_opener(_NoRedirect)

    def answers(self, requests: Sequence[dict[str, Any]], seconds: float) -> list[str | RewardError]:
        """Return the answer to each request, or why there is none. Equal requests are sent once.

        Args:
            seconds: time for all of them; requests that are not answered by then are given up.
        """
        keys = [key(request) for request in requests]
        different = dict(zip(keys, requests, strict=True))
        deadline = time.monotonic() + seconds
        known: dict[str, _Answer | RewardError] = {
            name: kept for name in different if (kept := self._kept(name)) is not None
        }
        asked = [name for name in different if name not in known]
        with ThreadPoolExecutor(min(self.concurrency, max(1, len(asked)))) as pool:
            replies = pool.map(lambda name: self._ask(different[name], deadline), asked)
            for name, reply in zip(asked, replies, strict=True):
                known[name] = reply
                if not isinstance(reply, RewardError):
                    self._keep(name, different[name], reply)
                    self.paid.update({"requests": 1, **reply.tokens})
        self.paid["questions"] += len(known)
        for answer in known.values():
            self.usage.update({"questions": 1, **({} if isinstance(answer, RewardError) else answer.tokens)})
        found = (known[name] for name in keys)
        return [answer if isinstance(answer, RewardError) else answer.text for answer in found]

    def summary(self) -> str:
        """Return the requests of this process and their cost, in words."""
        tokens = self.paid["prompt_tokens"] + self.paid["completion_tokens"]
        price = f", at a cost of {cost(self.paid, self.prices):.4g}" if self.prices else ""
        return f"{self.usage['questions']} questions, {self.paid['requests']} of them sent to {self.url}: {tokens} tokens{price}"

    def _ask(self, request: dict[str, Any], deadline: float) -> _Answer | RewardError:
        for attempt in range(ATTEMPTS):
            left = deadline - time.monotonic()
            if left <= 0:
                return RewardTimeoutError(f"the judge at {self.url} did not answer within the time limit of the batch")
            try:
                return self._post(request, left)
            except _Busy as busy:
                problem = str(busy)
            except RewardError as error:
                return error
            if attempt + 1 < ATTEMPTS:
                time.sleep(max(0.0, min(PAUSE_SECONDS * 2**attempt, deadline - time.monotonic())))
        return RewardError(f"the judge at {self.url} failed {ATTEMPTS} times, the last time with: {problem}")

    def _post(self, request: dict[str, Any], seconds: float) -> _Answer:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        wanted = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(request).encode(), headers)
        try:
            with self._open.open(wanted, timeout=seconds) as response:
                reply = json.loads(response.read())
        except urllib.error.HTTPError as error:
            shown = error.read()[:300].decode(errors="replace")
            if error.code in _RETRIED or error.code >= 500:
                raise _Busy(f"{error.code} {shown}") from error
            raise RewardError(f"the judge at {self.url} refused the request with {error.code}: {shown}") from error
        except (OSError, HTTPException) as error:
            raise _Busy(str(getattr(error, "reason", "") or error or type(error).__name__)) from error
        except ValueError as error:
            raise RewardError(f"the judge at {self.url} answered with invalid JSON") from error
        try:
            text = str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise RewardError(
                f"the judge at {self.url} answered without choices[0].message.content; is it an OpenAI-compatible server?"
            ) from None
        counted = reply.get("usage") or {}
        return _Answer(text, {kind: int(counted.get(kind) or 0) for kind in TOKENS})

    def _kept(self, name: str) -> _Answer | None:
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._file(name).read_text(encoding="utf-8"))
            return _Answer(str(kept["answer"]), {kind: int(kept["tokens"][kind]) for kind in TOKENS})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):  # damaged: it is asked again
            return None

    def _keep(self, name: str, request: dict[str, Any], answer: _Answer) -> None:
        if self.folder is None:
            return
        file = self._file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(
            json.dumps({"request": request, "answer": answer.text, "tokens": answer.tokens}), encoding="utf-8"
        )
        part.replace(file)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name[:2] / f"{name}.json"


@dataclass(frozen=True)
class _Answer:
    text: str
    tokens: dict[str, int]


class _Busy(Exception):
    """The request may succeed if it is sent again."""


def server_of_environment(folder: Path | None) -> JudgeServer:
    """Return the judge that the environment names.

    Raises:
        ConfigError: it names none, or a concurrency or prices that are none.
    """
    url = os.environ.get(URL)
    if not url:
        raise ConfigError(
            f"the reward function 'judge' needs the address of a server: set {URL}, such as {URL}=http://127.0.0.1:8000/v1"
            " (any server with OpenAI's interface; `posttrain serve-model` is one)"
        )
    given = os.environ.get(CONCURRENCY) or "8"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"{CONCURRENCY} = {given!r}: must be a whole number above 0")
    return JudgeServer(url, os.environ.get(API_KEY, ""), int(given), folder, _prices(os.environ.get(PRICES, "")))


def _prices(text: str) -> tuple[float, ...]:
    try:
        prices = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        prices = (math.nan,)
    if len(prices) not in (0, 2) or not all(price >= 0 for price in prices):
        raise ConfigError(
            f"{PRICES} = {text!r}: give two prices, such as 0.5,2.0: of a million prompt tokens and of as many of answers"
        )
    return prices


def body(model: str, question: str, max_tokens: int) -> dict[str, Any]:
    """Return the request for one answer: the most probable one."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}


def key(request: dict[str, Any]) -> str:
    """Return the name under which the answer to a request is kept."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def cost(tokens: Mapping[str, int], prices: Sequence[float]) -> float:
    """Return the price of tokens, given the prices of a million prompt tokens and of a million completion tokens.

    Example:
        >>> cost({"prompt_tokens": 2_000_000, "completion_tokens": 500_000}, [0.5, 4.0])
        3.0
    """
    return sum(tokens[kind] * price for kind, price in zip(TOKENS, prices, strict=True)) / 1e6
