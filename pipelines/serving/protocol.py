"""Requests and answers of OpenAI's interface: /v1/chat/completions and /v1/completions.

An option that would change the answer and is not implemented is refused: ignoring it would give different answers without a word.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipelines.serving.refusals import Refusal
from posttrain.settings import TEMPERATURES

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False, 0), "echo": (False,),
    "best_of": (1,), "response_format": ({"type": "text"},), "tools": ([],), "logit_bias": ({},), "suffix": ("",),
}  # fmt: skip
"""Options that are not implemented, with the values that change nothing."""
METADATA = {"user", "metadata", "store", "service_tier", "safety_identifier"}
"""Options that never change the answer."""
CHAT, TEXT = "chat.completion", "text_completion"


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """It pads pieces against listeners on the network; this server is reached only from its own machine."""


class Wanted(BaseModel):
    """The options that both interfaces have. Types are strict: `"5"`, `5.5` or `true` are no `max_tokens`."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=TEMPERATURES[1])
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=64)
    stop: str | Annotated[list[str], Len(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("temperature", "n", "stream", mode="before")
    @classmethod
    def default_for_null(cls, value: Any, info: ValidationInfo) -> Any:
        """Return the default for null, which clients send for an option that is not set."""
        return cls.model_fields[str(info.field_name)].default if value is None else value

    @field_validator("temperature")
    @classmethod
    def large_enough(cls, value: float) -> float:
        """Return the temperature. Raises ValueError if it is so small that log-probabilities overflow."""
        if 0 < value < TEMPERATURES[0]:
            raise ValueError(f"must be 0, which is greedy, or at least {TEMPERATURES[0]}")
        return value

    def refusal(self) -> Refusal | None:
        """Return the refusal of an option that is not implemented, or has no effect."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in METADATA and value not in WITHOUT_EFFECT.get(name, ()):
                return Refusal(f"{name} = {str(value)[:60]!r} is not implemented here; leave it out", name)
        if self.stream_options is not None and not self.stream:
            return Refusal("stream_options has an effect only with stream = true; leave it out", "stream_options")
        return None

    @property
    def stops(self) -> list[str]:
        """Return the texts that end an answer, without empty ones."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in found if text]


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str


class ChatWanted(Wanted):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def refusal(self) -> Refusal | None:
        """Refuse also fields of messages that the chat template would not see, such as tool_calls."""
        for place, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if value:
                    return Refusal(
                        f"messages[{place}] has {name}, which is not implemented here; leave it out",
                        f"messages[{place}].{name}",
                    )
        return super().refusal()


class TextWanted(Wanted):
    prompt: str | list[int] | list[str] | list[list[int]]

    @property
    def prompts(self) -> list[Any]:
        """Return each prompt: a text, or a list of ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt


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
