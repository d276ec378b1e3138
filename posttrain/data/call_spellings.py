"""Write the arguments of tool calls as a chat template expects them: as an object, or as JSON text.

Example:
    >>> call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    >>> turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    >>> [one["tool_calls"][0]["function"]["arguments"] for (one,) in spellings([turn])]
    [{'a': 1}, '{"a": 1}']
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from posttrain.errors import DataError
from posttrain.text import shortened

Message = Mapping[str, Any]


def spellings(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the conversation with its calls' arguments as objects, and as JSON text."""
    for spelt in (_as_object, _as_text):
        yield [
            {**message, "tool_calls": [spelt(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]


def shows_python(text: str, messages: Sequence[Message]) -> bool:
    """Return True if the text shows arguments as Python writes an object, which is no JSON: its template expects JSON text.

    Example:
        >>> turn = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": True}}}]}
        >>> shows_python("add {'a': True}", [turn]), shows_python('add {"a": true}', [turn])
        (True, False)
    """
    given = [_function(call).get("arguments") for message in messages for call in message.get("tool_calls") or ()]
    return any(isinstance(one, Mapping) and one and repr(one) in text for one in given)


def shows_calls(text: str, messages: Sequence[Message]) -> bool:
    """Return True if the text has the names of all calls."""
    return all(name in text for message in messages for name in _names(message))


def require_json(arguments: Any, where: str) -> None:
    """Raise DataError for arguments with NaN or an infinity: JSON has no such number, so the model would learn to write none."""
    try:
        json.dumps(arguments, allow_nan=False, default=str)
    except ValueError:
        raise DataError(
            f"{where}: the arguments of a tool call are {shortened(arguments)}, and JSON has neither NaN nor infinities; correct the row,"
            " or leave such an argument out"
        ) from None


def require_json_calls(turn: Message, where: str) -> None:
    """Apply `require_json` to every call of a turn."""
    for call in turn.get("tool_calls") or ():
        require_json(_function(call).get("arguments"), where)


def _names(message: Message) -> list[str]:
    functions = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    return [str(one["name"]) for one in functions if isinstance(one, Mapping) and "name" in one]


def _as_text(call: Any) -> Any:
    function = _function(call)
    if not isinstance(function.get("arguments"), Mapping):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _as_object(call: Any) -> Any:
    function = _function(call)
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        found = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": found}} if isinstance(found, dict) else call


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else {}
