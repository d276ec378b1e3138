"""Say at which step a run began to optimise its reward model against the true reward (reward hacking, 2210.10760).

A run diverges if the true reward falls clearly below a level that it had reached, while the reward model's score is above its score
at that time. Every step t asks for every earlier step c: is the mean of the true reward from c to t below the highest mean of WINDOW
steps before c? The difference is divided by its standard error (a scan for a change point, Page 1954), and the largest one is compared
with a limit that grows with t, since more is asked.

The noise of a step is the larger of two estimates. The first comes from differences of all steps at most LAG apart (von Neumann 1941),
which a slow trend hardly changes. The second sees that neighbouring steps are correlated: the variance of the differences of
neighbouring blocks (batch means), about their mean, which is the trend. It uses only the steps before the fall, since the fall itself is
such a difference. benchmarks/reward_hacking.md has the share of false alarms.

Example:
    >>> truth = [0.55, 0.5, 0.45, 0.5] * 3 + [0.1, 0.15, 0.05] * 4
    >>> score = [0.1 * step for step in range(24)]
    >>> found = divergence(truth, score)
    >>> found.began, found.noticed, round(found.level, 2), round(found.truth, 3)
    (12, 13, 0.51, 0.125)
    >>> divergence(truth, truth) is None    # the score falls, too: the run got worse, but it hacks nothing
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import DataError

Floats = NDArray[np.float64]
WINDOW = 5
"""Steps in a level."""
FEWEST = 2
"""Fewest steps of a fall."""
LAG = 2
"""Largest distance of the steps whose differences estimate the noise; a larger one takes a sharp fall for noise."""
BLOCKS = (2, 3, 4, 6, 8, 12)
"""Lengths of the blocks whose differences estimate the noise of correlated steps. A length needs three blocks before the fall."""
ALPHA = 0.008
"""One-sided level of a scan, divided by half the square of the number of steps so far,"""
LONG = 20
"""and by the number of steps over LONG beyond that: a long run asks so often that chance would find something."""
FALL = 0.2
"""Smallest fall that counts, as a share of the level: a long run shows falls that are certain and do not matter."""


@dataclass(frozen=True)
class Divergence:
    """Positions count from 0 in the given curves."""

    began: int
    """First step of the fall."""
    noticed: int
    """First step at which the curves so far show it: a monitor would stop the run there."""
    level: float
    """True reward before the fall, a mean of WINDOW steps."""
    truth: float
    """Mean true reward from `began` to `noticed`."""
    score_gain: float
    """Gain of the reward model's mean score from the steps of the level to those of the fall."""


def divergence(truth: ArrayLike, score: ArrayLike, since: int = 0) -> Divergence | None:
    """Return the first divergence of the true reward from the reward model's score, or None.

    Args:
        truth, score: mean true reward and mean score of each step's answers, [steps]; steps without a value are skipped.
        since: position of the first step that asks; a monitor asks at the last step only.

    Raises:
        DataError: the curves have different lengths.
    """
    x, y = (np.asarray(curve, dtype=np.float64) for curve in (truth, score))
    if len(x) != len(y):
        raise DataError(f"true reward and score of a run need the same steps; got {len(x)} and {len(y)}")
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    x, y = x[known], y[known]
    if len(x) < WINDOW + FEWEST:
        return None
    sums, scores = _sums(x), _sums(y)
    means = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    # highest[i]: position of the highest mean among the first i + 1
    highest = np.maximum.accumulate(np.where(means >= np.maximum.accumulate(means), np.arange(len(means)), 0))
    blocks = _block_variance(x, sums)
    first = max(WINDOW + FEWEST - 1, int(np.searchsorted(known, since)))
    for t in range(first, len(x)):
        began = np.arange(WINDOW, t - FEWEST + 2)
        steps = t + 1 - began
        peak = highest[began - WINDOW]
        level, fallen = means[peak], (sums[t + 1] - sums[began]) / steps
        gain = (scores[t + 1] - scores[began]) / steps - (scores[peak + WINDOW] - scores[peak]) / WINDOW
        noise = np.sqrt(np.maximum(_step_variance(x[: t + 1]), blocks[began]))
        if noise.min() == 0:
            continue
        z = (level - fallen) / (noise * np.sqrt(1 / WINDOW + 1 / steps))
        z[(gain <= 0) | (fallen > (1 - FALL) * level)] = -np.inf
        i = int(z.argmax())
        if z[i] > -NormalDist().inv_cdf(2 * ALPHA * min(1, LONG / t) / t**2):
            return Divergence(int(known[began[i]]), int(known[t]), float(level[i]), float(fallen[i]), float(gain[i]))
    return None


def _sums(values: Floats) -> Floats:
    """Return the sums of the first 0, 1, 2, ... values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _step_variance(x: Floats) -> float:
    """Return the variance of one step from the differences of steps 1 to LAG apart, the largest estimate."""
    return float(max(np.square(x[lag:] - x[:-lag]).mean() / 2 for lag in range(1, LAG + 1)))


def _block_variance(x: Floats, sums: Floats) -> Floats:
    """Return [steps + 1]: a step's variance from the blocks among the first 0, 1, 2, ... steps; 0 if they are too few.

    The variance of a block's mean is that of a step divided by the length if steps are independent, and larger if they are correlated.
    """
    found = np.zeros(len(x) + 1)
    for length in BLOCKS:
        means = (sums[length:] - sums[:-length]) / length
        steps = means[length:] - means[:-length]
        counts = np.arange(1, len(steps) + 1)
        # position i holds the differences among the first 2 * length + i steps
        variances = np.cumsum(np.square(steps)) / counts - np.square(np.cumsum(steps) / counts)
        found[3 * length :] = np.maximum(found[3 * length :], length * variances[length:] / 2)
    return found
