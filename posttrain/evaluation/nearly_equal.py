"""One rule for means of values that are equal, or nearly so: a spread that was not seen gives no interval of a point.

Resampling and t intervals estimate the spread over prompts from the prompts. If fewer than FEW prompts, and at most half of them, differ
from the rest, it is hardly seen. Then bounded values get exact limits, and values without bounds get none if all of them are equal.

* Shares, from 0 to 1: Clopper and Pearson's limits (1934) of the sum of n values. Values between 0 and 1 vary less than zeros and ones
  of the same mean, so the limits are on the safe side.
* Differences of shares, from -1 to 1: the gains and the losses are shares, each with its limits; they are joined by squaring and adding
  the distances (Newcombe 1998). n equal answers leave a difference of 3.7 / n on either side at 95 %.

Coverage is simulated in tests/evaluation/test_nearly_equal.py.

Example:
    >>> import numpy as np
    >>> [round(limit, 4) for limit in bounded_limits(np.ones(100), 0.95, least=0.0)]
    [0.9638, 1.0]
    >>> [round(limit, 4) for limit in bounded_limits(np.zeros(100), 0.95, least=-1.0)]
    [-0.0362, 0.0362]
    >>> differing(np.array([1.0, 1.0, 0.5, 1.0])), no_interval(4)
    (1, 'no interval from 4 equal values')
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FEW = 10
"""Fewer differing values than these show too little of the spread."""
UNBOUNDED = -math.inf
"""As `least`: the values have no bounds. Shares have the least value 0, their differences -1; the largest is 1."""
NEARLY_EQUAL = "Clopper-Pearson"
_ROUNDING = 1e-9
_HALVINGS, _TERMS = 50, 500


def differing(values: Floats) -> int:
    """Return how many values differ from the most frequent one."""
    _, counts = np.unique(np.round(values, 9), return_counts=True)
    return len(values) - int(counts.max())


def no_interval(count: int) -> str:
    """Return why there is no interval, in the words of all tables."""
    return f"no interval from {count} equal values" if count > 1 else "no interval from 1 value"


def limits(
    values: Floats, low: float, high: float, confidence: float, least: float = UNBOUNDED
) -> tuple[float, float, str | None]:
    """Return an interval that holds for nearly equal values, and the name of its method; None if `low` and `high` hold as they are.

    Args:
        values: one value for each independent unit, [prompts] or [groups].
        low, high: the interval that resampling or a t distribution gives.
        least: the least possible value: 0 for shares, -1 for differences of shares, else UNBOUNDED. NaN limits mean no interval.
    """
    few = differing(values)
    if few >= FEW or 2 * few > len(values) or (least == UNBOUNDED and few):
        return low, high, None
    if least == UNBOUNDED:
        # a spread between runs is one that was seen
        return (
            (low, high, None)
            if high - low > _ROUNDING * abs(high + low)
            else (math.nan, math.nan, no_interval(len(values)))
        )
    lower, upper = bounded_limits(values, confidence, least)
    return min(low, lower), max(high, upper), NEARLY_EQUAL


def bounded_limits(values: Floats, confidence: float, least: float) -> tuple[float, float]:
    """Return exact limits of the mean of shares (`least` 0), or of differences of shares (`least` -1)."""
    n = len(values)
    gains, losses = (float(np.clip(sign * values, 0.0, None).sum()) for sign in (1.0, -1.0))
    low, high = clopper_pearson(gains, n, confidence)
    if least == 0:
        return low, high
    less, more = clopper_pearson(losses, n, confidence)
    centre, gain, loss = (gains - losses) / n, gains / n, losses / n
    return (
        max(least, centre - math.hypot(gain - low, more - loss)),
        min(1.0, centre + math.hypot(high - gain, loss - less)),
    )


@lru_cache(maxsize=1024)
def clopper_pearson(successes: float, n: int, confidence: float) -> tuple[float, float]:
    """Return the limits of a share that cover it with at least the confidence, whatever it is (Clopper and Pearson 1934)."""
    tail, successes = (1 - confidence) / 2, min(max(successes, 0.0), float(n))
    low = _beta_quantile(successes, n - successes + 1, tail) if successes > _ROUNDING else 0.0
    high = 1 - _beta_quantile(n - successes, successes + 1, tail) if successes < n - _ROUNDING else 1.0
    return low, high


def _beta_quantile(a: float, b: float, share: float) -> float:
    """Return the point below which a beta distribution has the given share, by bisection. Written out: the library needs no scipy."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_share(a, b, middle) < share else (low, middle)
    return (low + high) / 2


def _beta_share(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function by Lentz's continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):  # the fraction converges slowly here
        return 1 - _beta_share(b, a, 1 - x)
    logs = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _TERMS):
        for part in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + part * d), 1 + part / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return math.exp(logs) * fraction / a
