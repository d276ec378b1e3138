"""Ask a model behind an OpenAI-compatible URL many questions: in parallel, within a time limit, each one once.

The address is no parameter, because it does not decide the answer: POSTTRAIN_JUDGE_URL, and POSTTRAIN_JUDGE_API_KEY if the server wants a
key. Answers are kept in a folder by the hash of model, messages and settings, so a repeated or resumed run asks nothing twice and gets the
same answers. If a different model takes over a name, delete the folder.

Example:
    >>> body("tiny", "2+2?", max_tokens=4)["messages"]
    [{'role': 'user', 'content': '2+2?'}]
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, JudgeError, JudgeTimeoutError, RewardError, RewardTimeoutError
from posttrain.judges import API_KEY, URL, ChatClient, Reply
from posttrain.judges.client import WAITS_SECONDS
from posttrain.judges.store import ReplyStore, key_of

CONCURRENCY = "POSTTRAIN_JUDGE_CONCURRENCY"
PRICES = "POSTTRAIN_JUDGE_PRICES"
"""An earlier place of prices, which are now in prices.yaml only."""
TOKENS = ("prompt_tokens", "completion_tokens")
FOLDER = Path(".posttrain/judges")


@dataclass
class JudgeServer:
    """A judge at a URL.

    Attributes:
        url: up to and including `/v1`.
        concurrency: most requests at the same time.
        folder: of kept answers; None keeps none.
        waits_seconds: before the second and each later try, if a server is busy or failing.
        usage: different `questions`, and the tokens of their answers as the server counts them, kept answers included:
            `prompt_tokens`, `completion_tokens`. These do not depend on which answers were kept.
        paid: this process's `questions` and `requests`, and the tokens of those requests, from the start.
    """

    url: str
    api_key: str = ""
    concurrency: int = 8
    folder: Path | None = FOLDER
    waits_seconds: tuple[float, ...] = WAITS_SECONDS
    usage: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self._client = ChatClient(
            self.url, "", self.api_key, timeout_seconds=math.inf, waits_seconds=self.waits_seconds
        )
        self._store = ReplyStore(self.folder)

    def answers(self, requests: Sequence[dict[str, Any]], seconds: float) -> list[str | RewardError]:
        """Return the answer to each request, or why there is none. Equal requests are sent once.

        Args:
            seconds: time for all of them; requests that are not answered by then are given up.
        """
        keys = [key_of(request) for request in requests]
        different = dict(zip(keys, requests, strict=True))
        deadline = time.monotonic() + seconds
        known: dict[str, Reply | RewardError] = {
            name: kept for name in different if (kept := self._store.read(name)) is not None
        }
        asked = [name for name in different if name not in known]
        with ThreadPoolExecutor(min(self.concurrency, max(1, len(asked)))) as pool:
            replies = pool.map(lambda name: self._ask(different[name], deadline), asked)
            for name, reply in zip(asked, replies, strict=True):
                known[name] = reply
                if not isinstance(reply, RewardError):
                    self._store.write(name, reply)
                    self.paid.update({"requests": 1, **_tokens(reply)})
        self.paid["questions"] += len(known)
        for answer in known.values():
            self.usage.update({"questions": 1, **({} if isinstance(answer, RewardError) else _tokens(answer))})
        found = (known[name] for name in keys)
        return [answer if isinstance(answer, RewardError) else answer.text for answer in found]

    def summary(self) -> str:
        """Return the requests of this process and their tokens, in words."""
        tokens = self.paid["prompt_tokens"] + self.paid["completion_tokens"]
        return (
            f"{self.paid['questions']} questions, {self.paid['requests']} of them sent to {self.url}: {tokens} tokens"
        )

    def _ask(self, request: dict[str, Any], deadline: float) -> Reply | RewardError:
        try:
            return self._client.post(request, deadline)
        except JudgeTimeoutError as error:
            return RewardTimeoutError(f"the judge at {error} of the batch")
        except JudgeError as error:
            return RewardError(f"the judge at {error}")


def _tokens(reply: Reply) -> dict[str, int]:
    return {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}


def server_of_environment(folder: Path | None) -> JudgeServer:
    """Return the judge that the environment names.

    Raises:
        ConfigError: it names none, a concurrency that is none, or prices, which are elsewhere now.
    """
    if PRICES in os.environ:
        raise ConfigError(
            f"{PRICES} is not read any more: the prices of all judges are in the project's prices.yaml, for the page of costs and MLflow."
            f" Type `unset {PRICES}`, and write there: judge_tokens: {{MODEL: {{input: 0.5, output: 2.0}}}}"
        )
    url = os.environ.get(URL)
    if not url:
        raise ConfigError(
            f"the reward function 'judge' needs the address of a server: set {URL}, such as {URL}=http://127.0.0.1:8000/v1"
            " (any server with OpenAI's interface; `posttrain serve` is one)"
        )
    given = os.environ.get(CONCURRENCY) or "8"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"{CONCURRENCY} = {given!r}: must be a whole number above 0")
    return JudgeServer(url, os.environ.get(API_KEY, ""), int(given), folder)


def body(model: str, question: str, max_tokens: int) -> dict[str, Any]:
    """Return the request for one answer: the most probable one."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
