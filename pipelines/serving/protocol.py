"""Requests and answers of OpenAI's interface: /v1/chat/completions and /v1/completions.

An option that would change the answer and is not implemented is refused: ignoring it would give different answers without a word.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from posttrain.errors import ConfigError

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False, 0), "echo": (False,),
    "best_of": (1,), "response_format": ({"type": "text"},), "tools": ([],), "logit_bias": ({},), "suffix": ("",),
}  # fmt: skip
"""Options that are not implemented, with the values that change nothing."""
METADATA = {"user", "metadata", "store", "service_tier", "safety_identifier"}
"""Options that never change the answer."""
CHAT, TEXT = "chat.completion", "text_completion"


class StreamOptions(BaseModel):
    include_usage: bool = False


class Wanted(BaseModel):
    """The options that both interfaces have."""

    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10)
    seed: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1, le=64)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raise ConfigError for an option that is not implemented."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in METADATA and value not in WITHOUT_EFFECT.get(name, ()):
                raise ConfigError(f"{name} = {str(value)[:60]!r} is not implemented here; leave it out")

    @property
    def stops(self) -> list[str]:
        """Return the texts that end an answer, without empty ones."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in found if text]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str


class ChatWanted(Wanted):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class TextWanted(Wanted):
    prompt: str | list[int] | list[str]


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def choice(kind: str, index: int, text: str, reason: str) -> dict[str, Any]:
    """Return one finished answer."""
    body: dict[str, Any] = (
        {"message": {"role": "assistant", "content": text}} if kind == CHAT else {"text": text, "logprobs": None}
    )
    return {"index": index, "finish_reason": reason} | body


def piece(kind: str, index: int, text: str, reason: str | None, first: bool) -> dict[str, Any]:
    """Return one piece of a streamed answer."""
    if kind == TEXT:
        return {"index": index, "finish_reason": reason, "text": text, "logprobs": None}
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
    return {"index": index, "finish_reason": reason, "delta": delta}


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text before the first of `stops`, and whether there was one.

    Example:
        >>> cut("one\\ntwo", ["two", "\\n"]), cut("one", ["\\n"])
        (('one', True), ('one', False))
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: str, stops: list[str]) -> str:
    """Return the start of an unfinished text that no later token changes: no partial character, no partial stop.

    Example:
        >>> settled("caf" + chr(0xFFFD), []), settled("one EN", ["END"]), settled("one", ["END"])
        ('caf', 'one ', 'one')
    """
    text = text.rstrip("\ufffd")
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held]
