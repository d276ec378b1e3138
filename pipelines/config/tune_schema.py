"""Define the section `tune` of params.yaml: equal tuning of all algorithms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.config.types import Count, Finite, Name, Section, Seed

KINDS = ("on_policy", "preference")


class SearchRange(Section):
    """Values of one parameter: an interval, or a list."""

    low: Finite | None = None
    high: Finite | None = None
    log: bool = False
    """True: drawn evenly on a logarithmic scale."""
    values: Annotated[list[Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> SearchRange:
        """Check that the range is either an interval or a list."""
        interval = self.low is not None and self.high is not None
        if interval == (self.values is not None) or (self.low is None) != (self.high is None):
            raise ValueError("give either low and high, or values")
        if self.values is not None and self.log:
            raise ValueError("log: has no effect on values; remove it")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"high {self.high} must be greater than low {self.low}")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"low {self.low} must be positive on a logarithmic scale")
        return self


class TuneParams(Section):
    """The same number of trials for every algorithm; chosen on some evaluation prompts, reported on the others."""

    trials: Count = 4
    """Trials of each algorithm. The first is the section as it is given, so that tuning cannot lose it."""
    method: Literal["random", "grid", "tpe"] = "random"
    """random: every value is drawn on its own. grid: the product of even steps or of the listed values. tpe: each trial is suggested from
    the scores of the earlier ones by Optuna's sampler (1907.10902), which needs the extra `tune`."""
    seed: Seed = 0
    """Seed of the drawn trials and of the split of the prompts."""
    training_seed: Seed = 1000
    """Training seed of all trials; it must not be one of project.seeds, which the chosen values are reported with."""
    selection: Annotated[Finite, Field(gt=0, lt=1)] = 0.5
    """Share of the evaluation prompts by which trials are chosen; the others are for the report."""
    space: dict[Name, dict[str, SearchRange]] = Field(default_factory=dict)
    """Parameter to its range, for an algorithm, or for all on_policy or preference algorithms. A parameter is a path within the section
    of the algorithm, e.g. budget.optimizer.learning_rate or options.clip_high."""
