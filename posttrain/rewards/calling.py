"""Calling a reward function on a batch, and finding the rows on which it fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class Outcome:
    """What a function said of a batch. values: one a row, None where it failed. failures: row -> "KeyError: 'x'"."""

    values: list[Any]
    failures: dict[int, str] = field(default_factory=dict)
    trace: str = ""
    """Traceback of the batch's exception."""


def call(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    arguments: Mapping[str, Any],
) -> Outcome:
    """The function's values for the batch. Where it raises, each row is tried alone, and the batch again without those that raise.

    A failure that no single row explains, or that goes on without them, is a failure of all rows.
    """

    def values_of(rows: Sequence[int]) -> list[Any]:
        chosen = {name: [values[i] for i in rows] for name, values in columns.items()}
        return list(function([prompts[i] for i in rows], [completions[i] for i in rows], **chosen, **arguments))

    every = range(len(completions))
    try:
        return Outcome(values_of(every))
    except Exception as error:  # whatever a user's function raises belongs to its rows
        message, trace = _said(error), traceback.format_exc()
    failures: dict[int, str] = {}
    for row in every:
        try:
            values_of([row])
        except Exception as error:
            failures[row] = _said(error)
    rest = [row for row in every if row not in failures]
    try:
        again = values_of(rest) if failures and rest else None
    except Exception:
        again = None
    if again is None:
        return Outcome([None] * len(every), failures if not rest else dict.fromkeys(every, message), trace)
    if len(again) != len(rest):
        return Outcome(again)  # refused for its count, like any other
    known = dict(zip(rest, again, strict=True))
    return Outcome([known.get(row) for row in every], failures, trace)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
