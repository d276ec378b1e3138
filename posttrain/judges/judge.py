"""Ask a judge many questions at once: a bounded number in parallel, each content only once, with a cache on disk and counted tokens.

Example:
    >>> from tempfile import TemporaryDirectory
    >>> class Echo:
    ...     def body(self, messages): return {"model": "echo", "messages": messages}
    ...     def complete(self, messages): return Reply(messages[-1]["content"].upper(), 3, 1)
    >>> with TemporaryDirectory() as folder:
    ...     judge = Judge(Echo(), Path(folder))
    ...     questions = [[{"role": "user", "content": text}] for text in ("a", "b", "a")]
    ...     judge.ask(questions), judge.usage.asked, judge.ask(questions[:1]), judge.usage.cached
    (['A', 'B', 'A'], 2, ['A'], 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from posttrain.judges.client import Message, Reply
from posttrain.judges.store import ReplyStore, key_of

CONCURRENT = 8
"""Requests under way at once."""


class ChatModel(Protocol):
    """Whatever completes a chat: a ChatClient, or a model in this process."""

    def body(self, messages: Sequence[Message]) -> Mapping[str, Any]:
        """Return everything that decides the reply; the cache is keyed by it."""
        ...

    def complete(self, messages: Sequence[Message]) -> Reply: ...


@dataclass
class Usage:
    """Requests that were sent, questions that the cache answered, and tokens that the server counted for the sent ones."""

    asked: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Judge:
    """A judge with its cache. `folder` None keeps replies in memory only.

    A reply is stored before `ask` returns, so that a run that was stopped asks nothing twice.
    """

    model: ChatModel
    folder: Path | None = None
    concurrent: int = CONCURRENT
    usage: Usage = field(default_factory=Usage)
    _memory: dict[str, Reply] = field(default_factory=dict, repr=False)

    def ask(self, questions: Sequence[Sequence[Message]]) -> list[str]:
        """Return the reply to each question, in their order. Equal questions are asked once.

        Raises:
            JudgeError: a question got no reply; the replies that came are stored.
        """
        keys = [self._key(messages) for messages in questions]
        missing = {key: messages for key, messages in zip(keys, questions, strict=True) if not self._recall(key)}
        with ThreadPoolExecutor(max(1, min(self.concurrent, len(missing)))) as pool:
            asked = {key: pool.submit(self._ask_and_store, key, messages) for key, messages in missing.items()}
            try:
                for future in asked.values():
                    reply = future.result()
                    self.usage.asked += 1
                    self.usage.prompt_tokens += reply.prompt_tokens
                    self.usage.completion_tokens += reply.completion_tokens
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.usage.cached += len(questions) - len(missing)
        return [self._memory[key].text for key in keys]

    def _ask_and_store(self, key: str, messages: Sequence[Message]) -> Reply:
        reply = self._memory[key] = self.model.complete(messages)
        ReplyStore(self.folder).write(key, reply)
        return reply

    def _recall(self, key: str) -> bool:
        """Load a kept reply into memory. Return False if there is none."""
        if key not in self._memory and (kept := ReplyStore(self.folder).read(key)) is not None:
            self._memory[key] = kept
        return key in self._memory

    def _key(self, messages: Sequence[Message]) -> str:
        return key_of([getattr(self.model, "url", ""), self.model.body(messages)])
