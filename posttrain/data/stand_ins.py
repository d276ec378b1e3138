"""Find by changes of single turns which characters of a rendered conversation a turn makes, and which turns a template leaves out.

A turn's text, or a tool call's name or arguments, is replaced by characters of Unicode's private use, which no text and no template has.

Example:
    >>> def render(turns):
    ...     return "".join(f"<{turn['role']}>{turn['content']}</s>" for turn in turns if turn["role"] != "tool")
    >>> turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}, {"role": "tool", "content": "x"}]
    >>> turn_part(turns, 1, render(turns), render), next(left_out(turns, render)).turn
    ((25, 30), 2)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import path
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str | None]
"""Renders a conversation; None if the template refuses it."""
_ONE, _TWO = "\ue000\ue000", "\ue001\ue001"


@dataclass(frozen=True)
class LeftOut:
    """A part of a turn that a template does not show: its text, or the argument of a call."""

    turn: int
    argument: str | None = None


def shared(a: str, b: str) -> int:
    """Return the length of the common beginning of two texts."""
    return len(path.commonprefix([a, b]))  # noqa: RUF071


def turn_part(
    messages: Sequence[Message], turn: int, full: str, render: Render, specials: Sequence[str] = ()
) -> tuple[int, int] | None:
    """Return where the text or the first call of an assistant's turn begins in `full`, and where its closing ends.

    Its beginning is where the rendering changes with the turn's text, or with the name of its first call if it has no text. Its end is
    where the changes of its text, or of its last call's arguments, end; the closing is what follows these at the end of a conversation, or
    the first of `specials` in it, if a template ends conversations with one more token, as Phi-3's does.
    Returns None if the rendering changes elsewhere, too, or the closing differs.
    """
    message = messages[turn]
    calls, content = message.get("tool_calls"), message.get("content")
    text = content if isinstance(content, str) and (content.strip() or not calls) else None
    if text is None and not calls:
        return None
    begun = _begun(messages, turn, full, render, _with_text if text is not None else _with_name)
    ended = _ended(messages, turn, full, render, _with_argument if calls else _with_text, specials)
    if begun is None or ended is None or begun > ended[0] or (begun == ended[0] and (calls or (text or "").strip())):
        return None
    part = full[begun : ended[0]].strip()
    # without its reasoning, perhaps
    if text is not None and not calls and not (text.strip().endswith(part) and bool(part) == bool(text.strip())):
        return None
    return begun, ended[1]


Change = Callable[[Message, str], Message]


def _begun(messages: Sequence[Message], turn: int, full: str, render: Render, change: Change) -> int | None:
    """Return where the rendering begins to change."""
    one, two = (render(_changed(messages, turn, change(messages[turn], stand_in))) for stand_in in (_ONE, _TWO))
    if one is None or two is None or _ONE not in one or one.replace(_ONE, _TWO) != two:
        return None
    begun = one.index(_ONE)
    return begun if full.startswith(one[:begun]) else None


def _ended(
    messages: Sequence[Message], turn: int, full: str, render: Render, change: Change, specials: Sequence[str]
) -> tuple[int, int] | None:
    """Return where the rendering stops changing, and where the closing after that ends."""
    changed = change(messages[turn], _ONE)
    until = messages[: turn + 1]
    one, plain, last = render(_changed(messages, turn, changed)), render(until), render([*until[:-1], changed])
    if one is None or plain is None or last is None or not 0 < one.count(_ONE) == last.count(_ONE):
        return None
    if change is _with_text and one.count(_ONE) > 1:
        return None
    stop = len(full) - shared(full[::-1], one[::-1])
    closing = plain[len(plain) - shared(plain[::-1], last[::-1]) :]
    first = min((sign for sign in specials if sign in closing), key=closing.index, default="")
    for found in (closing, closing[: closing.index(first) + len(first)] if first else closing):
        if full.startswith(found, stop):
            return stop, stop + len(found)
    return None


def last_change(messages: Sequence[Message], turn: int, full: str, render: Render) -> int | None:
    """Return the character of `full` after which nothing changes with a turn's text, or its last call; None if nothing does."""
    change = _with_argument if messages[turn].get("tool_calls") else _with_text
    one = render(_changed(messages, turn, change(messages[turn], _ONE)))
    return None if one is None or _ONE not in one else len(full) - shared(full[::-1], one[::-1])


def left_out(messages: Sequence[Message], render: Render) -> Iterator[LeftOut]:
    """Yield the turns' texts and the calls' arguments that a template shows neither here nor in a conversation of the same form."""
    numbered = [_numbered(message, i) for i, message in enumerate(messages)]
    text = render([message for message, _ in numbered])
    if text is None:
        return
    for i, (_, places) in enumerate(numbered):
        for sign, part in places.items():
            if _shows(text, sign):
                continue
            # a template may read other turns' contents, so only this one is changed
            only = render(_changed(messages, i, _replaced(messages[i], part, sign)))
            if only is not None and not _shows(only, sign):
                yield LeftOut(i, part[1] if part else None)


def hidden_names(
    messages: Sequence[Message],
    tools: Sequence[Any],
    render: Callable[[Sequence[Message], list[Any] | None], str | None],
) -> Iterator[tuple[str, str]]:
    """Yield the place and name of each tool and call whose name a template does not show.

    A name may be in the text for a different reason: that of a tool in a call or a question, that of a call among the tools.
    """
    given, text = [*tools] or None, render(messages, [*tools] or None)
    for k, tool in enumerate(tools):
        name = _tool_name(tool)
        if name is not None and not _is_named(
            name, text, render(messages, [*tools[:k], _renamed(tool), *tools[k + 1 :]])
        ):
            yield "the conversation's tools", name
    for i, message in enumerate(messages):
        for n, call in enumerate(message.get("tool_calls") or ()):
            name = _tool_name(call)
            if name is not None and not _is_named(
                name, text, render(_changed(messages, i, _with_call(message, n, name=_ONE)), given)
            ):
                yield f"the call in turn {i}", name


def _is_named(name: str, text: str | None, changed: str | None) -> bool:
    """Return True if a template shows a name; one that refuses the other name is not asked further."""
    return name in (text or "") if changed is None else _shows(changed, _ONE) or changed != text


def _tool_name(tool: Any) -> str | None:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _renamed(tool: Mapping[str, Any]) -> dict[str, Any]:
    inner = tool.get("function")
    return {**tool, "function": {**inner, "name": _ONE}} if isinstance(inner, Mapping) else {**tool, "name": _ONE}


def form(messages: Sequence[Message]) -> tuple[Any, ...]:
    """Return the roles and fields of a conversation, on which it depends which of its parts a template shows."""
    return tuple(
        (
            message.get("role"),
            _has_text(message),
            tuple(sorted(message)),
            tuple(tuple(_arguments(call) or ()) for call in message.get("tool_calls") or ()),
        )
        for message in messages
    )


def _numbered(message: Message, i: int) -> tuple[Message, dict[str, tuple[int, str] | None]]:
    """Return a turn whose text and arguments are stand-ins, and the part that each stands for: None for the text."""
    parts: list[tuple[int, str] | None] = [None] if _has_text(message) else []
    parts += [(n, name) for n, call in enumerate(message.get("tool_calls") or ()) for name in _arguments(call) or ()]
    places = {f"{_ONE}{i}.{k}{_TWO}": part for k, part in enumerate(parts)}
    for sign, part in places.items():
        message = _replaced(message, part, sign)
    return message, places


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def _arguments(call: Any) -> Mapping[str, Any] | None:
    """Return the arguments of a call if they are an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    return arguments if isinstance(arguments, Mapping) else None


def _replaced(message: Message, part: tuple[int, str] | None, sign: str) -> Message:
    if part is None:
        return _with_text(message, sign)
    number, name = part
    arguments = _arguments(message["tool_calls"][number]) or {}
    return _with_call(message, number, arguments={**arguments, name: sign})


def _shows(text: str, sign: str) -> bool:
    return sign in text or json.dumps(sign)[1:-1] in text


def _changed(messages: Sequence[Message], turn: int, message: Message) -> list[Message]:
    return [*messages[:turn], message, *messages[turn + 1 :]]


def _with_text(message: Message, text: str) -> Message:
    return {**message, "content": text}


def _with_name(message: Message, name: str) -> Message:
    return _with_call(message, 0, name=name)


def _with_argument(message: Message, sign: str) -> Message:
    """Return the turn whose last call has one more argument, or more text in place of arguments."""
    calls = message["tool_calls"]
    function = calls[-1].get("function", {})
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    more = {**arguments, sign: sign} if isinstance(arguments, Mapping) else f"{arguments or ''}{sign}"
    return _with_call(message, len(calls) - 1, arguments=more)


def _with_call(message: Message, number: int, **changes: Any) -> Message:
    calls = [*message["tool_calls"]]
    function = calls[number].get("function")
    calls[number] = {**calls[number], "function": {**(function if isinstance(function, Mapping) else {}), **changes}}
    return {**message, "tool_calls": calls}
