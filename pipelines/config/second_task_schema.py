"""Parameters of a second task, which shows what training made a model forget."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipelines.config.types import Count, Section


class SecondTask(Section):
    """A task that no algorithm trains on. All models answer the same prompts, greedily."""

    source: str
    """An environment of a single turn: arithmetic, stories, word_problems, reasoning_gym:NAME, or package.module:ENVIRONMENT."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The environment's options, as under data.environments."""
    rows: Count = 200
    """Number of prompts."""
