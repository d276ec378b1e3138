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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from posttrain.environments.parts import Row
from posttrain.errors import ConfigError
from posttrain.text import nearest


@dataclass(frozen=True)
class Environment:
    """A task with a verifiable answer.

    Attributes:
        rows: `rows(kind, count, seed, **options)` returns the rows of one table with `prompt` and `answer`.
        judge: `judge(completion, answer)` returns the reward of one completion, None if it cannot be scored.
    """

    name: str
    rows: Callable[..., list[Row]]
    judge: Callable[[str, str], float | None]

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Score completions with `judge`; this is a reward function for `posttrain.train`."""
        return [self.judge(completion, gold) for completion, gold in zip(completions, answer, strict=True)]


BUILT_IN = {"arithmetic": "posttrain.environments.arithmetic", "stories": "posttrain.environments.stories"}
"""Modules of the built-in environments; each one defines ENVIRONMENT."""
_REGISTERED: dict[str, Environment] = {}


def register(new: Environment) -> Environment:
    """Make an environment available by its name in this process; return it.

    Raises:
        ConfigError: a different environment has this name.
    """
    if new.name in BUILT_IN or _REGISTERED.get(new.name, new) != new:
        raise ConfigError(f"an environment named {new.name!r} already exists; choose a different name")
    return _REGISTERED.setdefault(new.name, new)


def environment(name: str) -> Environment:
    """Return a registered or built-in environment, or import `package.module:attribute`.

    Raises:
        ConfigError: there is no such environment.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    module, _, attribute = f"{BUILT_IN[name]}:ENVIRONMENT".partition(":") if name in BUILT_IN else name.partition(":")
    if not attribute:
        valid = [*BUILT_IN, *_REGISTERED]
        raise ConfigError(f"no environment {name!r}{nearest(name, valid)}, or give package.module:attribute")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import the environment {name!r}: {error}") from error
    if not isinstance(found, Environment):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, not an Environment")
    return found
