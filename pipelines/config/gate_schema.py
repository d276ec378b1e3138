"""Define the section `gate` of params.yaml."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, model_validator

from pipelines.config.types import Finite, NonNegative, Positive, Section, Share


class FormatParams(Section):
    """A required format of completions."""

    pattern: str
    """Regular expression that a well-formed completion must contain."""
    min_share: Share

    @model_validator(mode="after")
    def _compiles(self) -> FormatParams:
        """Check that the pattern is a regular expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None
        return self


class DriftParams(Section):
    """Limits above which arriving prompts count as different from the training prompts. Drift is shown, and refuses no model."""

    length_psi: Positive = 0.25
    """Limit of the population stability index of the prompts' lengths; an index within chance never counts."""
    new_words: Share = 0.1
    """Limit of the share of words that no training prompt has."""
    score_psi: Positive = 0.25
    """Limit of the population stability index of the reward model's scores of answers; an index within chance never counts."""
    min_prompts: Annotated[int, Field(ge=2)] = 30
    """Fewer prompts, and fewer answers, are not compared."""


class PeopleParams(Section):
    """Required preference of people for a candidate over the champion, from the sessions of `posttrain label`."""

    win_rate: Share = 0.5
    """The 95 % interval of the share of comparisons that the candidate won must begin here or above."""
    min_prompts: Annotated[int, Field(ge=1)] = 20
    """Fewer compared prompts show nothing."""


class BenchmarkLimit(Section):
    """A benchmark on which a candidate must not be worse than the champion by more than a margin (non-inferiority)."""

    task: str
    """One of evaluation.benchmarks.tasks."""
    metric: str = "acc"
    """A metric of the task that is a mean over documents, as named in report/benchmarks.csv."""
    tolerated_loss: Positive
    """The interval of the paired difference over documents must lie above minus this number."""
    lower_is_better: bool = False
    """True: a larger value of the metric is the loss."""


class GateParams(Section):
    """Requirements for an aligned model to become champion, on the prompts and seeds of the evaluation table."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    """Confidence of the interval of the paired difference of true rewards; divided among the candidates."""
    tolerated_loss: NonNegative
    """The interval may reach so far below 0. With 0 the gain must be shown to be above 0."""
    min_prompts: Annotated[int, Field(ge=2)]
    """Fewer prompts in the evaluation table show nothing, and no model is promoted."""
    max_missing: Share
    """Share of answers without a true reward, of either model; each of them is not counted as right."""
    max_kl: Positive
    """Limit of the mean KL to the supervised model, in nats per response."""
    max_length_ratio: Annotated[Finite, Field(ge=1)]
    """Limit of the ratio of mean lengths, of challenger and champion, in either direction."""
    max_truncated: Share
    max_divergence: NonNegative
    """Limit by which a reward model's score may gain more than the true reward, in standard deviations."""
    drift: DriftParams = DriftParams()
    people: PeopleParams | None = None
    """null: people's preference is shown if there is one, and not required."""
    format: FormatParams | None = None
    benchmarks: list[BenchmarkLimit] = Field(default_factory=list)
    """Benchmarks that a candidate must keep; each needs its task in evaluation.benchmarks."""
