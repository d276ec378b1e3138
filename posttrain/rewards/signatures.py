"""How a reward function is called: f(prompts, completions, **columns), with the first two by name if the order differs.

Example:
    >>> def swapped(completions, prompts, **columns):
    ...     return [1.0 for _ in completions]
    >>> names_needed(call_signature(swapped)), misfit(call_signature(swapped))
    (True, None)
    >>> misfit(call_signature(lambda completions: []))  # doctest: +ELLIPSIS
    'its parameters are (completions), and it is called as f(prompts, completions, **columns)...'
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from inspect import Parameter, Signature
from types import MethodType
from typing import Any

CALL = "f(prompts, completions, **columns)"
_NAMES = ("prompts", "completions")
_SINGULAR = ("prompt", "completion")
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_RECEIVES = {"prompt": "prompts", "completion": "completions"}
"""Content of a parameter of this name."""
_SHOWN: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}


def call_signature(function: Callable[..., Any]) -> Signature | None:
    """Return the signature that a call must fit, None if there is none, as for functions of C.

    A decorator's `*args, **kwargs` are those of the function that it wraps; its own names count before them.
    """
    try:
        found = _own_signature(function)
    except (TypeError, ValueError):
        return None
    given = {*function.keywords} & {*_NAMES} if isinstance(function, partial) else {*()}
    # what a partial gives already is no parameter that the call could fill, and **columns could not take it once more
    kept = [
        p for n, p in found.parameters.items() if n not in given and not (given and p.kind is Parameter.VAR_KEYWORD)
    ]
    return found.replace(parameters=kept)


def names_needed(expected: Signature | None, others: Collection[str] = ()) -> bool:
    """Return True if prompts and completions must be passed by name: in order they, or one of the other arguments, would not fit."""
    return expected is not None and not _fits_in_order(expected, others) and _fits_by_name(expected)


def misfit(
    expected: Signature | None,
    columns: Sequence[str] | None = None,
    arguments: Iterable[str] = (),
    where: str = "with functools.partial",
) -> str | None:
    """Return why a function with this signature cannot be called with the columns and further arguments, None if it can.

    Args:
        columns: None checks only how it takes prompts and completions.
        where: how a user gives further arguments.
    """
    if expected is None:
        return None
    given = [*(columns or ()), *arguments]
    by_name = names_needed(expected, given)
    if not by_name and not _fits_in_order(expected, given):
        return f"{_said(expected)}. Give it the parameters prompts and completions, in any order"
    if columns is None:
        return None
    if by_name and (taken := [name for name in _NAMES if name in given]):
        return f"the rows have a column {taken[0]!r}, which is an argument of the call {CALL}. Rename the column"
    try:
        in_order = () if by_name else _NAMES
        expected.bind(*in_order, **dict.fromkeys([*_NAMES, *given] if by_name else given))
    except TypeError as error:
        return (
            f"{error}. It is called as {CALL}, and the rows have the columns {', '.join(columns) or 'prompt only'}. Add the column to"
            f" every row, give other arguments {where}, and end the function's parameters with **columns"
        )
    return None


def _own_signature(function: Callable[..., Any]) -> Signature:
    """Return the signature of the first function inside decorators that does not only pass on `*args, **kwargs`."""
    while True:
        found = inspect.signature(function, follow_wrapped=False)
        kinds = {parameter.kind for parameter in found.parameters.values()}
        if not kinds >= {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}:
            return found
        if not (inspect.isroutine(function) or isinstance(function, partial)):
            function = function.__call__  # type: ignore[operator]
        inside: Callable[..., Any] | None = getattr(function, "__wrapped__", None)
        if inside is None:
            return found
        function = MethodType(inside, function.__self__) if inspect.ismethod(function) else inside


def _fits_in_order(expected: Signature, others: Collection[str]) -> bool:
    placed = _placed(expected, _NAMES)
    if placed is None or any(name in others and expected.parameters[name].kind in _BY_NAME for name in placed):
        return False
    named = all(placed.get(name) == name for name in _NAMES if name in expected.parameters)
    return named and all(placed.get(name, _RECEIVES[name]) == _RECEIVES[name] for name in _SINGULAR)


def _fits_by_name(expected: Signature) -> bool:
    """Return True if it has both names, or one of them or no other parameter at all, and `**columns` for the rest."""
    kinds = {name: parameter.kind for name, parameter in expected.parameters.items()}
    if any(kinds.get(name, Parameter.KEYWORD_ONLY) not in _BY_NAME for name in _NAMES):
        return False
    named = [name for name in _NAMES if name in kinds]
    return len(named) == 2 or (Parameter.VAR_KEYWORD in kinds.values() and (len(named) == 1 or len(kinds) == 1))


def _placed(expected: Signature, given: Iterable[str]) -> dict[str, Any] | None:
    """Return what each parameter gets from these arguments in order, None if the signature does not take them."""
    try:
        return dict(expected.bind_partial(*given).arguments)
    except TypeError:
        return None


def _said(expected: Signature) -> str:
    names = [_SHOWN.get(parameter.kind, "") + name for name, parameter in expected.parameters.items()]
    only = [p for p in expected.parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    stars = any(p.kind is Parameter.VAR_POSITIONAL for p in expected.parameters.values())
    if only and not stars:
        names.insert(list(expected.parameters).index(only[0].name), "*")
    last = [name for name, p in expected.parameters.items() if p.kind is Parameter.POSITIONAL_ONLY]
    if last:
        names.insert(names.index(last[-1]) + 1, "/")
    return f"its parameters are ({', '.join(names)}), and it is called as {CALL}"
