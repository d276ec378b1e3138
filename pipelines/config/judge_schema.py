"""Define the section `judge` of params.yaml: a model that compares answers as an annotator."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipelines.config.types import Count, Finite, Positive, Section


class AloneParams(Section):
    """The agreement with people from which a judge's own judgements go to the inbox."""

    items: Count = 30
    """Items that the judge and at least one person have judged, over all sessions."""
    agreement: Annotated[Finite, Field(ge=-1, le=1)] = 0.4
    """Least Cohen's kappa for pairs, or Krippendorff's alpha for scores."""


class JudgeParams(Section):
    """A model that judges answers: `posttrain judge`."""

    model: str | None = None
    """Name of the model at POSTTRAIN_JUDGE_URL; without that variable, a model of this project, such as champion, or a folder."""
    criteria: str | None = None
    """The criteria in words; null takes the library's. Changed criteria make a different annotator."""
    max_tokens: Count = 512
    concurrent: Count = 8
    """Most requests under way at once."""
    timeout_seconds: Positive = 60.0
    """Limit of one try; a request has four."""
    alone: AloneParams = AloneParams()

    @model_validator(mode="before")
    @classmethod
    def _prices_are_elsewhere(cls, given: Any) -> Any:
        """Refuse prices here: those of all judges are in one list."""
        if isinstance(given, dict) and "prices" in given:
            raise ValueError(
                "prices is now judge_tokens in prices.yaml, which has the prices of all judges and their currency. Remove it here and write"
                " there: judge_tokens: {MODEL: {input: 0.5, output: 2.0}}"
            )
        return given
