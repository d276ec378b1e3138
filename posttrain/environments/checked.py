"""Call an environment's function `rows`, and check its arguments and its rows: it is code of the task's author.

Example:
    >>> listed = CheckedRows("letters", lambda kind, count, seed: [{"prompt": "a"}])
    >>> listed("problems", 1, 0)
    Traceback (most recent call last):
    posttrain.errors.ConfigError: environment 'letters': row 0 of problems has no 'answer' (it has prompt); return prompt and answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, get_args

from posttrain.environments.parts import Kind, Row
from posttrain.errors import ConfigError, PosttrainError
from posttrain.text import nearest, one_line, shortened

_NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",)),
    "preferences": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "problems": (("prompt", "answer"),),
    "evaluation": (("prompt", "answer"),),
}
"""The columns of each table's rows; further ones are passed to the reward functions."""


@dataclass(frozen=True)
class CheckedRows:
    """`rows(kind, count, seed, **options)` of the environment `name`."""

    name: str
    function: Callable[..., Any]

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.function

    def __call__(self, *arguments: Any, **options: Any) -> list[Row]:
        """Return the rows of one table.

        Raises:
            ConfigError: the arguments do not fit the function, it raised, or it returned something else than rows.
        """
        if reason := self.misfit(*arguments, **options):
            raise ConfigError(f"environment {self.name!r}: rows(kind, count, seed, **options): {reason}")
        kind, count = (
            arguments[i] if i < len(arguments) else options.get(name) for i, name in enumerate(("kind", "count"))
        )
        if kind not in get_args(Kind):
            raise ConfigError(f"environment {self.name!r}: no table {kind!r}{nearest(str(kind), get_args(Kind))}")
        try:
            found = self.function(*arguments, **options)
            listed = isinstance(found, Iterable) and not isinstance(found, str | bytes | Mapping)
            return self._checked(kind, count, list(found) if listed else found)
        except PosttrainError:  # it says what is wrong
            raise
        except (Exception, SystemExit) as error:  # a task's author may raise anything
            reason = f"{type(error).__name__}: {one_line(str(error))}"
            raise ConfigError(
                f"environment {self.name!r} could not make its table {kind} ({reason}); correct its function rows"
            ) from error

    def misfit(self, *arguments: Any, **options: Any) -> str:
        """Return why the arguments do not fit the function, and which it takes; empty if they do."""
        try:
            expected = signature(self.function)
        except (TypeError, ValueError):  # a function of C has none
            return ""
        try:
            expected.bind(*arguments, **options)
        except TypeError as error:
            valid = [name for name, p in expected.parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
            return f"{error}; the options of this environment are {', '.join(valid) or 'none'}"
        return ""

    def _checked(self, kind: Any, count: Any, found: Any) -> list[Row]:
        where = f"environment {self.name!r}: "
        if not isinstance(found, list):
            raise ConfigError(f"{where}the table {kind} is {shortened(found)}; return a list of rows")
        if not found:
            raise ConfigError(f"{where}the table {kind} has no row; return `count` rows")
        needs = _NEEDS[kind]
        for i, row in enumerate(found):
            if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
                raise ConfigError(
                    f"{where}row {i} of {kind} is {shortened(row)}; return mappings from texts to values, with {' and '.join(needs[0])}"
                )
            if not any(set(columns) <= set(row) for columns in needs):
                missing = next(name for name in needs[0] if name not in row)
                has = ", ".join(row) or "none"
                raise ConfigError(
                    f"{where}row {i} of {kind} has no {missing!r} (it has {has}); return {' and '.join(needs[0])}"
                )
        if len(found) != count:
            raise ConfigError(
                f"{where}the table {kind} has {len(found)} rows, and {count} were asked for; return `count` rows, or ask for {len(found)}"
            )
        return found
