"""Bring chat messages of any common spelling to one form: a list of {role, content} with text, and other fields as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.call_spellings import require_json
from posttrain.data.messages import is_tool, one_reading, role_of, weighted
from posttrain.errors import DataError

Message = dict[str, Any]
_ROLES, _TEXTS = ("role", "from"), ("content", "value")
"""How messages spell their role and their text; one conversation may mix the spellings."""
_HUMAN = re.compile(r"\n\n(Human|Assistant): ?")


def canonical_messages(value: Any, where: str) -> Any:
    """Return chat messages in the canonical form; anything else as it is. Raises DataError for content that is not text."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        return value
    if not all(_has(turn, _ROLES) for turn in value) or not any(_has(turn, _TEXTS) for turn in value):
        return value
    return [_message(one_reading(turn, f"{where}, turn {i}"), f"{where}, turn {i}") for i, turn in enumerate(value)]


def _has(turn: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(name in turn for name in names)


def from_json(value: Any) -> Any:
    """Return the list of chat messages that a text spells as JSON, such as a field of a CSV file; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    spelt = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
    return found if spelt and all(_has(turn, _ROLES) and _has(turn, _TEXTS) for turn in found) else value


def canonical_tools(value: Any, where: str) -> str | None:
    """Return the tools that a conversation offers as JSON, None if there are none. Raises DataError if they are anything else."""
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value) if value.strip() else []
        except ValueError:
            tools = None
    tools = ([tools] if tools else []) if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(map(is_tool, tools)):
        raise DataError(
            f"{where}: tools is {_short(value)}; it must be a list of objects such as"
            ' [{"type": "function", "function": {"name": "add"}}], or this list as JSON. Correct the row or leave tools out.'
        )
    return json.dumps(_without_nulls(tools), sort_keys=True, ensure_ascii=False) if tools else None


def _without_nulls(schema: Any) -> Any:
    """Return a tool's schema without keys whose value is null, except the ones for which null is a value."""
    if isinstance(schema, dict):
        return {k: _without_nulls(v) for k, v in schema.items() if v is not None or k in ("default", "const")}
    return [_without_nulls(one) for one in schema] if isinstance(schema, list) else schema


def human_assistant(text: str) -> list[Message] | None:
    r"""Return the turns of a text such as "\n\nHuman: ... \n\nAssistant: ...", or None if it is none."""
    parts = _HUMAN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if len(parts) < 3 or parts[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[parts[i]], "content": parts[i + 1].strip()} for i in range(1, len(parts), 2)]


def _message(turn: Mapping[str, Any], where: str) -> Message:
    """Return a message in the canonical form. Raises DataError for a role or content that is not text."""
    if not isinstance(turn["role"], str):
        raise DataError(f"{where}: the role is {turn['role']!r}; it must be text, such as user or assistant")
    name = turn["role"].strip()
    # a column's file format may fill up absent fields with null
    others = {key: value for key, value in turn.items() if key not in ("role", "content") and value is not None}
    others = weighted(others, where)
    said = turn.get("content")
    if said is None and isinstance(others.get("refusal"), str):  # how OpenAI writes an answer that declines
        said = others.pop("refusal")
    message = {"role": role_of(name, where), "content": _text(said, where), **others}
    if name == "function_call":
        message |= {"role": "assistant", "content": "", "tool_calls": [_call(said, where)]}
    if isinstance(message.get("function_call"), Mapping):
        message["tool_calls"] = [message.pop("function_call")]
    if "tool_calls" in message:
        message["tool_calls"] = [_call(call, where) for call in _calls(message["tool_calls"], where)]
    return message


def _text(content: Any, where: str) -> str:
    """Return the text of a content, which may be missing, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"{where}: the content is {content!r} ({type(content).__name__}); it must be text or a list of text parts"
        )
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get(kind) if isinstance(part, Mapping) and kind in ("text", "refusal") else None
    if not isinstance(text, str):
        shown = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise DataError(
            f"{where}: holds a content part of type {shown!r}; only text can be trained. Remove the row or the part."
        )
    return text


def _calls(calls: Any, where: str) -> list[Any]:
    calls = [calls] if isinstance(calls, Mapping) else calls or []
    if not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {_short(calls)}; it must be a list of objects with name and arguments")
    return calls


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _call(call: Any, where: str) -> Any:
    """Return a tool call as templates expect it: {type, function: {name, arguments}} with arguments as an object."""
    call = _parsed(call)
    if not isinstance(call, Mapping):
        raise DataError(f"{where}: a tool call is {call!r}; it must be an object with name and arguments")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or "name" not in function:
        raise DataError(f"{where}: a tool call without a function name; correct the row")
    inner = {**function, "arguments": _parsed(function.get("arguments", {}))}
    require_json(inner["arguments"], where)
    outer = call if "function" in call else {}
    return {"type": "function", **{k: v for k, v in outer.items() if v is not None}, "function": inner}


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, dict) else value
