"""Decide a claim by a rule that is fixed before the runs.

A claim states that a contrast is more than `at_least`. Its interval covers seeds and prompts (or groups of prompts), or seeds if the
outcome is one number per run. The level is divided by the number of claims of the study (Bonferroni).

    supported      the whole interval is above at_least
    contradicted   the whole interval is below at_least: the effect is smaller than claimed, or reversed
    undecided      the interval contains at_least, or all values are equal, which leaves no interval
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from posttrain.evaluation.crossed import crossed_contrast
from posttrain.evaluation.statistics import Floats

Verdict = Literal["supported", "contradicted", "undecided"]
MOST_SEEDS = 1000
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A contrast with its interval. `from_runs` and `from_rows` are the parts of its variance from seeds and from prompts."""

    value: float
    low: float
    high: float
    df: float
    from_runs: float
    from_rows: float
    seeds: int

    @property
    def limits(self) -> tuple[float, float]:
        """Return the ends of the interval; infinite without one, which holds no claim and is written as such."""
        return (self.low, self.high) if self.low == self.low else (-math.inf, math.inf)


def estimate(
    values: Mapping[str, Floats], contrast: Mapping[str, float], confidence: float, groups: Sequence[str] | None = None
) -> Estimate:
    """Estimate a contrast of arms from [prompts, seeds] tables, or from [seeds] values of runs.

    `groups` holds the group of each prompt if prompts are not independent.
    """
    names = list(contrast)
    # one number of each run is a table of one row
    sides, weights = [np.atleast_2d(values[name]) for name in names], [contrast[name] for name in names]
    found = crossed_contrast(sides, weights, confidence, groups if values[names[0]].ndim == 2 else None)
    return Estimate(found.value, found.low, found.high, found.df, found.from_runs, found.from_prompts, max(found.seeds))


def verdict(found: Estimate, at_least: float) -> Verdict:
    """Decide one claim."""
    if found.low > at_least:
        return "supported"
    return "contradicted" if found.high < at_least else "undecided"


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """Decide a study: supported if all claims are, contradicted if one is, else undecided."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if all(v == "supported" for v in verdicts) else "undecided"


def seeds_to_decide(found: Estimate, at_least: float, confidence: float) -> int | None:
    """Return the fewest seeds that decide the claim with 80 % power if the true contrast is the present estimate.

    Prompts are kept. None if MOST_SEEDS are not enough, so that more prompts are needed or the contrast is at the limit.
    """
    gap = abs(found.value - at_least)
    for seeds in range(found.seeds, MOST_SEEDS + 1):
        variance = found.from_runs * found.seeds / seeds + found.from_rows
        df = found.df * seeds / found.seeds
        reach = float(stats.t.ppf(0.5 + confidence / 2, df) + stats.t.ppf(POWER, df))
        if reach * np.sqrt(variance) <= gap:
            return seeds
    return None
