"""Environments by name: the rows of a task and the judge of its answers, together.

Example:
    >>> arithmetic = environment("arithmetic")
    >>> row = arithmetic.rows("problems", 1, 0, terms=2, max_term=99, careless=0.0)[0]
    >>> row, arithmetic.judge("#120", row["answer"])
    ({'prompt': '35+85=', 'answer': '120'}, 1.0)
    >>> arithmetic.reward([row["prompt"]] * 2, ["#120", "#121"], answer=[row["answer"]] * 2)
    [1.0, 0.0]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import Any

from posttrain.api_arguments import require, require_function
from posttrain.environments.checked import CheckedRows
from posttrain.environments.parts import Kind, Row
from posttrain.errors import ConfigError
from posttrain.text import nearest, one_line, shortened


@dataclass(frozen=True)
class Conversation:
    """A conversation whose newest turn is the model's, as an environment's `step` reads it.

    Attributes:
        messages: the prompt, then the model's turns and the environment's replies, each with `role` and `content`.
        columns: the other columns of the problem's row, such as `answer`.
        turn: number of the model's turns.
    """

    messages: tuple[Mapping[str, Any], ...]
    columns: Mapping[str, Any]
    turn: int

    @property
    def said(self) -> str:
        """Return the text of the model's newest turn."""
        return str(self.messages[-1]["content"])


Messages = Sequence[Mapping[str, Any]]
Step = Callable[[Conversation], Messages | None]


@dataclass(frozen=True)
class Environment:
    """A task with a verifiable answer.

    Attributes:
        rows: `rows(kind, count, seed, **options)` returns the rows of one table with `prompt` and `answer`. Arguments and rows are checked.
        judge: `judge(completion, answer)` returns the reward of one completion, None if it cannot be scored. Of a conversation of several
            turns it reads the last one.
        step: `step(conversation)` returns the messages that follow the model's turn, such as a tool's result; None ends the conversation.
            None: the task has a single turn.
    """

    name: str
    rows: Callable[..., list[Row]]
    judge: Callable[[str, str], float | None]
    step: Step | None = None

    def __post_init__(self) -> None:
        require("Environment", "name", self.name, str, "a text")
        for field in ("rows", "judge"):
            require_function("Environment", field, getattr(self, field), "a function; see docs/environments.md")
        if _is_swapped(self.judge):
            raise ConfigError(
                "Environment: judge is called as judge(completion, answer); give its parameters this order"
            )
        if self.step is not None:
            require_function("Environment", "step", self.step, "a function f(conversation), or None for a single turn")
        if not isinstance(self.rows, CheckedRows):
            object.__setattr__(self, "rows", CheckedRows(self.name, self.rows))

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Score completions with `judge`; this is a reward function for `posttrain.train`."""
        return [self.judge(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


def _is_swapped(judge: Callable[..., Any]) -> bool:
    """Return True if a judge names its parameters in the other order than it is called with, so that it would compare the wrong texts."""
    try:
        placed = signature(judge).bind_partial("completion", "answer").arguments
    except (TypeError, ValueError):  # a function of C has no signature; other misfits are reported when it is called
        return False
    return any(placed.get(name, name) != name for name in ("completion", "answer"))


PACKAGE = "posttrain.environments"
PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""An import path package.module:attribute."""
WRAPPED = ("reasoning_gym", "verifiers", "openenv")
"""Packages of tasks that are wrapped by a module of this package with the same name."""
_REGISTERED: dict[str, Environment] = {}


@cache
def built_in() -> tuple[str, ...]:
    """Return the names of the built-in environments: the modules of this package that define ENVIRONMENT."""
    names = sorted(module.name for module in iter_modules(import_module(PACKAGE).__path__))
    return tuple(
        name for name in names if name != "base" and hasattr(import_module(f"{PACKAGE}.{name}"), "ENVIRONMENT")
    )


def is_wrapped(name: str) -> bool:
    """Return True if the name is that of a task in a package that this one wraps, such as `reasoning_gym:gcd`."""
    package, colon, _ = name.partition(":")
    return bool(colon) and package in WRAPPED


def import_path(name: str) -> str:
    """Return `reasoning_gym:NAME` as the import path of the environment that wraps the task; other names as they are."""
    return f"{PACKAGE}.{name}" if is_wrapped(name) else name


def is_environment(name: str) -> bool:
    """Return True if a source is the name of an environment, or has the form of its import path. This imports no user's module."""
    return name in built_in() or name in _REGISTERED or PATH.fullmatch(name) is not None


def checked_rows(
    found: Environment, kind: Kind, count: int, seed: int, options: Mapping[str, Any], place: str | None = None
) -> list[Row]:
    """Return the environment's rows of one table.

    Args:
        place: where the options are written, for the error; default: data.environments and the name.

    Raises:
        ConfigError: `options` do not fit its function `rows`.
    """
    assert isinstance(found.rows, CheckedRows)
    if reason := found.rows.misfit(kind, count, seed, **options):
        raise ConfigError(f"{place or f'data.environments.{found.name}'}: {reason}")
    return found.rows(kind, count, seed, **options)


def single_turn_rows(name: str, count: int, seed: int, options: Mapping[str, Any], place: str) -> list[Row]:
    """Return evaluation rows of an environment that has one answer to each prompt. `place` is where it is named, for errors.

    Raises:
        ConfigError: there is no such environment, it has several turns, its options or number of rows do not fit it, or a prompt is no
            text and no messages.
    """
    found = environment(name)
    if found.step is not None:
        raise ConfigError(f"{place}: {name} has several turns; choose a task with one answer to each prompt")
    rows = checked_rows(found, "evaluation", count, seed, options, f"{place}.options")
    for i, row in enumerate(rows):
        if not isinstance(row["prompt"], str | list) or not row["prompt"]:
            raise ConfigError(
                f"{place}: the prompt of row {i} is {shortened(row['prompt'])}; return a text, or messages"
            )
    return rows


def register(new: Environment) -> Environment:
    """Make an environment available by its name in this process; return it.

    Raises:
        ConfigError: a different environment has this name.
    """
    require("register", "new", new, Environment, "an Environment(name, rows, judge)")
    if new.name in built_in() or _REGISTERED.get(new.name, new) != new:
        raise ConfigError(f"an environment named {new.name!r} already exists; choose a different name")
    return _REGISTERED.setdefault(new.name, new)


def environment(name: str) -> Environment:
    """Return a registered or built-in environment, or import `package.module:attribute`.

    Raises:
        ConfigError: there is no such environment.
    """
    require("environment", "name", name, str, "a name, or an import path package.module:attribute")
    if name in _REGISTERED:
        return _REGISTERED[name]
    path = f"{PACKAGE}.{name}:ENVIRONMENT" if name in built_in() else import_path(name)
    module, _, attribute = path.partition(":")
    if not attribute:
        valid = [*built_in(), *_REGISTERED]
        raise ConfigError(f"no environment {name!r}{nearest(name, valid)}, or give package.module:attribute")
    try:
        found = getattr(import_module(module), attribute)
    except ConfigError:  # it says what is wrong
        raise
    except (Exception, SystemExit) as error:  # the import runs a user's module, which may raise anything
        raise ConfigError(f"cannot import the environment {name!r}: {one_line(str(error))}") from error
    if not isinstance(found, Environment):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, not an Environment")
    return found
