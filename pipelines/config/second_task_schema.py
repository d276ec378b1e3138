"""Parameters of a second task, which shows what training made a model forget."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from pipelines.config.types import Count, Section
from posttrain.environments.base import built_in, checked_rows, environment, is_environment
from posttrain.errors import ConfigError
from posttrain.text import nearest


class SecondTask(Section):
    """A task that no algorithm trains on. All models answer the same prompts, greedily."""

    source: str
    """An environment of a single turn: arithmetic, stories, word_problems, reasoning_gym:NAME, or package.module:ENVIRONMENT."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The environment's options, as under data.environments."""
    rows: Count = 200
    """Number of prompts."""

    @model_validator(mode="after")
    def _usable(self) -> SecondTask:
        """Check the source, and the rows of a built-in one, before anything is trained."""
        if not is_environment(self.source):
            raise ValueError(f"source {self.source!r} is no environment{nearest(self.source, built_in())}")
        if self.source not in built_in():
            return self
        found = environment(self.source)
        if found.step is not None:
            raise ValueError(f"source {self.source!r} has several turns; a second task has one answer to each prompt")
        try:
            checked_rows(found, "evaluation", self.rows, 0, self.options, "options")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self
