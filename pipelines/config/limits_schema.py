"""Define the section `limits` of params.yaml."""

from __future__ import annotations

from pydantic import Field

from pipelines.config.types import Name, Positive, Section


class LimitsParams(Section):
    """Time limits, which depend on the machine. They are no part of a run's identity: a change makes no stage stale."""

    reward_seconds: dict[Name, Positive] = Field(default_factory=dict)
    """Time limit of a reward function for one batch of answers, by the reward's name; its process is then killed. Default: 60 for `math`
    and import paths, 600 for `judge`, else none."""
