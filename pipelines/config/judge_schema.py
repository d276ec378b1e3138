"""Define the section `judge` of params.yaml: a model that compares answers as an annotator."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.config.types import Count, Finite, NonNegative, Positive, Section


class PriceParams(Section):
    """Money per million tokens, in any currency."""

    input: NonNegative = 0.0
    output: NonNegative = 0.0


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
    prices: PriceParams = PriceParams()
    alone: AloneParams = AloneParams()
