"""Environments of other packages, which are replayed: their reward needs the whole conversation and the row's column `entry`.

Example:
    >>> counted = ReplayedEnvironment("turns", lambda *_: [], lambda *_: None, package="count", score=lambda entry, turns: len(turns))
    >>> counted.reward(["p"], ["a"], answer=[""], entry=["{}"])
    [1]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.environments.base import Environment
from posttrain.errors import ConfigError

ENTRY = "entry"
"""Column with the inputs of a replay, as JSON."""
Turns = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ReplayedEnvironment(Environment):
    """An environment of a package that this one wraps.

    Attributes:
        package: the part of the source's name before the colon.
        score: `score(entry, turns)` replays a conversation and returns its reward, None if none was given.
    """

    package: str = dataclasses.field(kw_only=True)
    score: Callable[[str, Turns], float | None] = dataclasses.field(kw_only=True)

    def reward(
        self, prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Return the reward of each conversation.

        Raises:
            ConfigError: the rows have no column `entry`.
        """
        if ENTRY not in columns:
            source = f"{self.package}:{self.name}"
            raise ConfigError(
                f"the reward {source} needs the column {ENTRY!r}, which only rows of the source {source} have; use a reward of the task's"
                " own rows, such as `answer`, for other rows"
            )
        turns = columns.get("conversation") or [[{"role": "assistant", "content": text}] for text in completions]
        return [self.score(entry, own) for entry, own in zip(columns[ENTRY], turns, strict=True)]
