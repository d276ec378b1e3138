"""Tools' results in the order of their calls, and calls that are written with null arguments.

Example:
    >>> calls = [{"id": "a", "function": {"name": "f"}}, {"id": "b", "function": {"name": "f"}}]
    >>> results = [{"role": "tool", "tool_call_id": "b", "content": "2"}, {"role": "tool", "tool_call_id": "a", "content": "1"}]
    >>> turns, moved = in_order_of_calls([{"role": "assistant", "content": "", "tool_calls": calls}, *results])
    >>> [turn["content"] for turn in turns], moved
    (['', '1', '2'], True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
MOVED = "conversations whose tools' results were brought into the order of the calls, by tool_call_id"
UNASKED = "tools' results whose tool_call_id is none of the calls before them"
NULLS = "tool calls with an argument that is null, which is trained as it is: a file made from Parquet may be filled up with them"
"""How the validation page counts conversations with tools."""


def in_order_of_calls(turns: Sequence[Message]) -> tuple[list[Message], bool]:
    """Return the turns with each run of tools' results in the order of its calls, and True if one was moved.

    Most chat templates show no ids, so a result's place is the only sign of its call. Results stay unless they name different calls.
    """
    ordered, moved, start = list(turns), False, 0
    while start < len(ordered):
        stop = start + 1
        calls = ordered[start].get("tool_calls")
        while stop < len(ordered) and ordered[stop].get("role") == "tool":
            stop += 1
        results = ordered[start + 1 : stop]
        place = {call.get("id"): i for i, call in enumerate(calls or ()) if call.get("id") is not None}
        named = [result.get("tool_call_id") for result in results]
        if len(set(named)) == len(named) and all(name in place for name in named):
            ordered[start + 1 : stop] = sorted(results, key=lambda result: place[result.get("tool_call_id")])
            moved |= ordered[start + 1 : stop] != results
        start = stop
    return ordered, moved


def unasked(turns: Sequence[Message]) -> int:
    """Return the number of tools' results with an id that no call before them has, if calls have ids."""
    ids: set[Any] = set()
    count = 0
    for turn in turns:
        ids |= {call.get("id") for call in turn.get("tool_calls") or ()} - {None}
        name = turn.get("tool_call_id")
        count += turn.get("role") == "tool" and name is not None and bool(ids) and name not in ids
    return count


def null_arguments(turns: Sequence[Message]) -> int:
    """Return the number of calls with an argument that is null."""
    calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
    arguments = [call["function"].get("arguments") for call in calls]
    return sum(isinstance(one, Mapping) and any(value is None for value in one.values()) for one in arguments)
