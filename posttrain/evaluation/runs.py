"""Summarise and compare algorithms by one score of each of their runs (rliable, 2108.13264). numpy and scipy.

Example:
    >>> probability_of_improvement([0.9, 0.8], [0.8, 0.7]), round(effect_size([0.9, 0.8], [0.8, 0.7]), 4)
    (0.875, 0.8081)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from posttrain.evaluation.statistics import Floats, floats


def interquartile_mean(scores: ArrayLike) -> float:
    """Return the mean of the middle half of the runs' scores (rliable, 2108.13264); 25 % are cut at each end."""
    from scipy import stats

    return float(stats.trim_mean(floats(scores).ravel(), 0.25))


def performance_profile(scores: ArrayLike, levels: ArrayLike) -> Floats:
    """Return the share of runs whose score exceeds each level (2108.13264)."""
    values = floats(scores).ravel()
    shares: Floats = (values[None, :] > floats(levels)[:, None]).mean(1)
    return shares


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """Return the chance that a run of `a` scores above a run of `b`, ties counting half (2108.13264)."""
    gaps = floats(a).ravel()[:, None] - floats(b).ravel()[None, :]
    return float((0.5 + 0.5 * np.sign(gaps)).mean())


def effect_size(a: ArrayLike, b: ArrayLike) -> float:
    """Return Hedges' g of the runs' mean scores: the difference in pooled standard deviations, corrected for few seeds.

    NaN if a side has one run or no run differs from its side's mean.
    """
    left, right = floats(a).ravel(), floats(b).ravel()
    freedom = len(left) + len(right) - 2
    if min(len(left), len(right)) < 2:
        return float("nan")
    pooled = np.sqrt(((len(left) - 1) * left.var(ddof=1) + (len(right) - 1) * right.var(ddof=1)) / freedom)
    if pooled == 0:
        return float("nan")
    return float((left.mean() - right.mean()) / pooled * (1 - 3 / (4 * freedom - 1)))
