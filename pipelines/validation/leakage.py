"""Form in which prompts of training and held-out rows are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipelines.data.tables import Row, plain
from posttrain.data.messages import INSTRUCTING
from posttrain.text import as_prompt

_TURN, _PART = "\x1e", "\x1d"


def prompt_keys(row: Row, held_out: bool) -> set[str]:
    """Return the keys of a row's prompts. A training row leaks if it shares one with a held-out row.

    A training conversation has one prompt before each trained turn, and the question before that turn. A message of the system or
    the developer counts if both sides have one.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, list):
        return _keys("", _one(plain(prompt)), held_out)
    if held_out:
        return _keys(*_split(prompt), held_out)
    keys = set[str]()
    for completion in _completions(row):
        for before in _before_trained(prompt, completion):
            system, turns = _split(before)
            keys |= _keys(system, turns, held_out) | _keys(system, _split(before[-1:])[1], held_out)
    return keys or _keys(*_split(prompt), held_out)


def shown_prompt(row: Row) -> str:
    """Return the end of a prompt, which is where prompts with one system message differ."""
    return plain(row["prompt"])[-60:]


def _completions(row: Row) -> list[list[dict[str, Any]]]:
    return [row[name] for name in ("completion", "chosen", "rejected") if isinstance(row.get(name), list)]


def _before_trained(prompt: list[Any], completion: list[Any]) -> Iterator[list[Any]]:
    for i, message in enumerate(completion):
        if message["role"] == "assistant" and message.get("weight", 1):
            yield [*prompt, *completion[:i]]


def _split(messages: Sequence[dict[str, Any]]) -> tuple[str, str]:
    system = _TURN.join(_one(m["content"]) for m in messages if m["role"] in INSTRUCTING)
    turns = [m for m in messages if m["role"] not in INSTRUCTING]
    return system, _TURN.join(_one(m["content"] if m["role"] == "user" else plain([m])) for m in turns)


def _one(text: str) -> str:
    return as_prompt(text) or text


def _keys(system: str, turns: str, held_out: bool) -> set[str]:
    """Return keys that two rows share if their turns are equal and their system messages are, or one has none."""
    whole, without, either = f"{system}{_PART}{turns}", f"{_PART}{turns}", f"{_PART}{_PART}{turns}"
    if held_out:
        return {whole, without} if system else {either}
    return {whole, either}
