"""Call a reward function on a batch and find the rows on which it fails.

Example:
    >>> def inverse(prompts, completions, **_):
    ...     return [1 / len(text) for text in completions]
    >>> result = call(inverse, ["p", "p"], ["four", ""], columns={}, arguments={})
    >>> result.values, result.failures
    ([0.25, None], {1: 'ZeroDivisionError: division by zero'})
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    If no single row explains the failure, or the batch still fails without those rows, all rows count as failed.
    """

    def values_of(rows: Sequence[int]) -> list[Any]:
        chosen = {name: [values[i] for i in rows] for name, values in columns.items()}
        return _listed(function([prompts[i] for i in rows], [completions[i] for i in rows], **chosen, **arguments))

    every = range(len(completions))
    try:
        return CallResult(values_of(every))
    except Exception as error:  # a user's function may raise anything; the failure is attributed to its rows
        message, trace = _described(error), traceback.format_exc()
    failures: dict[int, str] = {}
    for row in every:
        try:
            values_of([row])
        except Exception as error:
            failures[row] = _described(error)
    rest = [row for row in every if row not in failures]
    try:
        again = values_of(rest) if failures and rest else None
    except Exception:
        again = None
    if again is None:
        return CallResult([None] * len(every), failures if not rest else dict.fromkeys(every, message), trace)
    if len(again) != len(rest):
        return CallResult(again)  # the caller rejects a wrong count
    known = dict(zip(rest, again, strict=True))
    return CallResult([known.get(row) for row in every], failures, trace)


def _listed(values: Any) -> list[Any]:
    """Return a function's values as plain numbers: it may return a tensor or an array, or a list of their elements."""
    if values is None:
        raise TypeError("the function returned None; it must return a list with one number or None per completion")
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(found, list):
        raise TypeError(
            f"the function returned {found!r}; it must return a list with one number or None per completion"
        )
    return [value.item() if getattr(value, "shape", None) == () else value for value in found]


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
