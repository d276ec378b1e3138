"""Call a reward function on a batch and find the rows on which it fails.

Example:
    >>> def inverse(prompts, completions, **_):
    ...     return [1 / len(text) for text in completions]
    >>> result = call(inverse, ["p", "p"], ["four", ""], columns={}, arguments={})
    >>> result.values, result.failures
    ([0.25, None], {1: 'ZeroDivisionError: division by zero'})
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from posttrain.rewards.signatures import call_signature, names_needed
from posttrain.text import shortened

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class CallResult:
    """Result of a reward function on one batch.

    Attributes:
        values: one per row, None if the function failed on it.
        failures: row -> "KeyError: 'x'".
        trace: traceback of the exception that the whole batch raised.
    """

    values: list[Any]
    failures: dict[int, str] = field(default_factory=dict)
    trace: str = ""


def call(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any],
) -> CallResult:
    """Return the function's values for the batch. If it raises, try each row separately, then the batch without the rows that raise.

    `prompts` and `completions` are passed by name if the function has them in a different order, or one of them and `**columns`.

    If no single row explains the failure, or the batch still fails without those rows, all rows count as failed.
    """

    by_name = names_needed(call_signature(function), [*columns, *arguments])

    def values_of(rows: Sequence[int]) -> list[Any]:
        chosen = {name: [_own(values[i]) for i in rows] for name, values in columns.items()}
        asked = [_own(prompts[i]) for i in rows]
        texts = [completions[i] for i in rows]
        if by_name:
            return _listed(function(prompts=asked, completions=texts, **chosen, **arguments))
        return _listed(function(asked, texts, **chosen, **arguments))

    every = range(len(completions))
    try:
        return CallResult(values_of(every))
    except (Exception, SystemExit) as error:  # a user's function may raise anything; its rows are found
        message, trace = _described(error), traceback.format_exc()
    failures: dict[int, str] = {}
    for row in every:
        try:
            values_of([row])
        except (Exception, SystemExit) as error:
            failures[row] = _described(error)
    rest = [row for row in every if row not in failures]
    try:
        again = values_of(rest) if failures and rest else None
    except (Exception, SystemExit):
        again = None
    if again is None:
        return CallResult([None] * len(every), failures if not rest else dict.fromkeys(every, message), trace)
    if len(again) != len(rest):
        return CallResult(again)  # the caller rejects a wrong count
    known = dict(zip(rest, again, strict=True))
    return CallResult([known.get(row) for row in every], failures, trace)


def _own(value: Any) -> Any:
    """Return the value, or a copy that the function may change: the next function reads the same row."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def _listed(values: Any) -> list[Any]:
    """Return a function's values as plain numbers: it may return a tensor or an array, or a list of their elements.

    Raises:
        TypeError: they are no list in the order of the completions, such as a mapping, whose entries would be its keys.
    """
    unordered = isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set)
    columns = hasattr(values, "columns")  # a data frame, whose entries would be the names of its columns
    if unordered or columns or not (hasattr(values, "tolist") or isinstance(values, Iterable)):
        if inspect.iscoroutine(values):
            values.close()
            raise TypeError("the function is asynchronous; define it with def, and run its coroutines in asyncio.run")
        raise TypeError(f"the function returned {shortened(values)}; it must return {_WANTED}")
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(found, list):
        raise TypeError(f"the function returned {shortened(found)}; it must return {_WANTED}")
    return [_plain(value) for value in found]


_WANTED = "a list with one number or None per completion"


def _plain(value: Any) -> Any:
    """Return an array's element as a number; a date is left unchanged, because its number is a time."""
    is_date = getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m")
    return value.item() if getattr(value, "shape", None) == () and not is_date else value


def _described(error: BaseException) -> str:
    # a text with half of a surrogate pair could be neither printed nor stored
    text = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
    return f"{text} (the function ended the program)" if isinstance(error, SystemExit) else text
