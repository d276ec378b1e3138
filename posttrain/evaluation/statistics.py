"""Intervals and tests for comparing policies on the same prompts. Needs only numpy.

The sampling unit is the prompt. Several answers to one prompt (samples of one model, or one algorithm with several seeds) are not
independent, so they are averaged within the prompt first, and whole prompts are resampled or flipped. An interval therefore covers the
choice of prompts, given the trained models.

Missing rewards (None or NaN: a judge that timed out, an unreadable gold answer) are neither right nor wrong. They are excluded, and
`missing` counts them: a prompt counts with its known answers, and not at all if it has none.

Example:
    Eight prompts that only a solved and one that only b solved: p = 2 (1 + 9) / 2^9

    >>> mcnemar(8, 1)
    0.0390625
    >>> [round(limit, 3) for limit in wilson(8, 10)], pass_at_k(n=4, correct=1, k=2)
    ([0.49, 0.943], 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import DataError
from posttrain.evaluation.nearly_equal import UNBOUNDED, limits

Floats = NDArray[np.float64]
_EXACT_FLIPS = 16
"""Up to this many non-zero differences all sign patterns are enumerated: 2**16 sums take a few milliseconds."""
_CHUNK = 2_000_000
"""Random numbers in memory at once while resampling (16 MB)."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits, over `n` prompts; `missing` values were excluded.

    Both limits are NaN if there is no interval; `method` then says why.
    """

    value: float
    low: float
    high: float
    n: int
    missing: int
    method: str

    @property
    def known(self) -> bool:
        """Return True if there is an interval."""
        return not math.isnan(self.low)


@dataclass(frozen=True)
class PairedTest:
    """`difference` = mean of a minus mean of b over the prompts that both answered; `p` is two-sided."""

    difference: Interval
    p: float
    method: str
    only_a: int | None = None
    """Prompts that only a solved; None if a prompt's value is not simply 0 or 1."""
    only_b: int | None = None


@dataclass(frozen=True)
class Resampling:
    """Settings of intervals and Monte Carlo tests: equal settings give equal numbers."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def generator(self) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(self.seed))


def floats(values: Sequence[Any] | ArrayLike) -> Floats:
    """Return values as float64 with None as NaN.

    Raises:
        DataError: a value is infinite, so it has no mean.
    """
    table = np.asarray(values, dtype=np.float64)
    if np.isinf(table).any():
        raise DataError("a value to average is infinite; find the reward or log-probability that gave it")
    return table


def per_prompt(values: ArrayLike) -> Floats:
    """Return each prompt's mean over its known repeats, NaN if it has none: [prompts] or [prompts, repeats] -> [prompts]."""
    table = floats(values)
    if table.ndim == 1:
        return table
    known = np.isfinite(table)
    counts = known.sum(axis=1)
    sums = np.where(known, table, 0.0).sum(axis=1)
    means = np.full(len(table), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def is_binary(values: ArrayLike) -> bool:
    """Return True if every known value is 0 or 1."""
    known = _known(floats(values).ravel())
    return bool(np.isin(known, (0.0, 1.0)).all())


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion (Wilson 1927; recommended by Brown, Cai and DasGupta 2001).

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n). It stays inside [0, 1] and does not collapse to a point at 0 or n successes, as
    the bootstrap and Wald's interval do: 0 of 400 right is compatible with an accuracy of 0.95 %.
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"a proportion needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, square = successes / n, z * z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_means(values: ArrayLike, resampling: Resampling) -> Floats:
    """Return the means of `resamples` draws of n prompts with replacement (Efron 1979). Values are [prompts], all known."""
    units = floats(values)
    n = len(units)
    generator = resampling.generator()
    rows = max(1, _CHUNK // n)
    means = [
        units[generator.integers(0, n, (min(rows, resampling.resamples - done), n))].mean(axis=1)
        for done in range(0, resampling.resamples, rows)
    ]
    return np.concatenate(means)


def bootstrap(values: ArrayLike, resampling: Resampling, least: float = UNBOUNDED) -> Interval:
    """Return the percentile bootstrap over prompts: the (1-c)/2 and (1+c)/2 quantiles of the resampled means.

    If prompts are equal or nearly so, the limits are those of `nearly_equal`; `least` is the least possible value there.
    """
    table = floats(values)
    units = _known(per_prompt(table))
    _require(units)
    tail = (1 - resampling.confidence) / 2
    drawn = np.quantile(bootstrap_means(units, resampling), [tail, 1 - tail])
    low, high, method = limits(units, float(drawn[0]), float(drawn[1]), resampling.confidence, least)
    return Interval(float(units.mean()), low, high, len(units), _missing(table), method or "bootstrap over prompts")


def mean_interval(values: ArrayLike, resampling: Resampling, shares: bool = False) -> Interval:
    """Return the interval of a share or score: Wilson's if every prompt has one 0 or 1, else the bootstrap over prompts.

    Prompts that are nearly equal, as a single one always is, have the limits of `nearly_equal`, or none if values have no bounds.

    Args:
        shares: the values are shares of answers, so they lie between 0 and 1 although they are not all 0 or 1.
    """
    table = floats(values)
    units = _known(per_prompt(table))
    _require(units)
    binary = is_binary(table)
    if binary and _width(table) == 1:
        low, high = wilson(float(units.sum()), len(units), resampling.confidence)
        return Interval(float(units.mean()), low, high, len(units), _missing(table), "Wilson")
    return bootstrap(table, resampling, 0.0 if binary or shares else UNBOUNDED)


def share_interval(values: ArrayLike, resampling: Resampling) -> Interval:
    """Return the interval of a mean of shares, such as pass@k and win rates: each lies between 0 and 1."""
    return mean_interval(values, resampling, shares=True)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of McNemar's test (McNemar 1947): a fair coin is this far from half among discordant prompts.

    p = min(1, 2 * sum_{i <= min(a, b)} C(a+b, i) / 2^(a+b)), summed in integers, hence exact for any number of prompts.
    """
    if only_a < 0 or only_b < 0:
        raise DataError(f"numbers of discordant prompts cannot be negative; got {only_a} and {only_b}")
    n, term, total = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return 1.0 if only_a == only_b else min(1.0, 2 * total / (1 << n))


def sign_flip(differences: ArrayLike, resampling: Resampling) -> float:
    """Return the two-sided p of the paired permutation test of a zero mean (Fisher 1935), with one sign per prompt.

    If a and b are exchangeable within a prompt, each prompt's difference is equally likely with the opposite sign. p is the share of sign
    patterns whose |sum| reaches the observed one. Few prompts: all patterns. Otherwise random patterns with the observed one counted in,
    (1 + hits) / (1 + resamples), so that p is never 0 (Phipson and Smyth 2010).
    """
    moved = _known(floats(differences))
    moved = moved[moved != 0]
    if not len(moved):
        return 1.0
    # Sums in a different order differ in the last bits; ties must still count as reached.
    reached = abs(float(moved.sum())) - 1e-9 * float(np.abs(moved).sum())
    if len(moved) <= _EXACT_FLIPS:
        sums = np.zeros(1)
        for value in moved:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= reached).mean())
    generator, hits = resampling.generator(), 0
    rows = max(1, _CHUNK // len(moved))
    for done in range(0, resampling.resamples, rows):
        shape = (min(rows, resampling.resamples - done), len(moved))
        signs = generator.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ moved) >= reached).sum())
    return (1 + hits) / (1 + resampling.resamples)


def for_family(resampling: Resampling, tests: int) -> Resampling:
    """Return settings with enough draws for a Monte Carlo p-value to survive Holm's correction over `tests` tests.

    The smallest p is 1 / (1 + draws). It must be well below (1 - confidence) / tests, or no result could be significant.
    """
    needed = math.ceil(20 * tests / (1 - resampling.confidence))
    return replace(resampling, resamples=max(resampling.resamples, needed))


def paired(a: ArrayLike, b: ArrayLike, resampling: Resampling, tests: int = 1, shares: bool = False) -> PairedTest:
    """Compare two models on the same prompts; rows are prompts, columns (if any) repeats of that prompt.

    McNemar's test if both give one 0 or 1 per prompt; otherwise prompts are clusters and the sign-flip test is used. The interval of the
    difference is the bootstrap over prompts, each drawn with both models' answers, or that of `nearly_equal` if hardly any prompt differs.

    Args:
        tests: number of tests that the p-value will be corrected for.
        shares: the values lie between 0 and 1 although they are not all 0 or 1.
    """
    left, right = per_prompt(a), per_prompt(b)
    if len(left) != len(right):
        raise DataError(f"paired tests need the same prompts on both sides; got {len(left)} and {len(right)}")
    both = np.isfinite(left) & np.isfinite(right)
    left, right = left[both], right[both]
    _require(left)
    bounded = shares or (is_binary(a) and is_binary(b))
    spread = bootstrap(left - right, resampling, -1.0 if bounded else UNBOUNDED)
    difference = replace(
        spread, missing=int((~both).sum()), method=spread.method.replace("bootstrap", "paired bootstrap")
    )
    if is_binary(left) and is_binary(right) and _width(a) == _width(b) == 1:
        only_a, only_b = int((left > right).sum()), int((right > left).sum())
        return PairedTest(difference, mcnemar(only_a, only_b), "exact McNemar", only_a, only_b)
    return PairedTest(
        difference, sign_flip(left - right, for_family(resampling, tests)), "sign-flip permutation over prompts"
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm 1979). This bounds the chance of any false finding, without assumptions.

    The i-th smallest of m (from 0) becomes the running maximum of (m - i) p, at most 1. The order of the input is kept.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that at least one of k answers is right, drawn without replacement from n with `correct` right ones.

    1 - C(n-c, k) / C(n, k) (Chen et al. 2021, 2107.03374), unbiased for the pass rate of k fresh samples; computed as a product of ratios
    so that no binomial overflows.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise DataError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n; got n={n}, correct={correct}, k={k}")
    if n - correct < k:
        return 1.0
    i = np.arange(n - correct + 1, n + 1)
    return float(1.0 - np.prod(1.0 - k / i))


def pass_at_k_by_prompt(values: ArrayLike, k: int) -> Floats:
    """Return pass@k of each prompt from [prompts, samples] of 0, 1 or missing; NaN if fewer than k samples are known."""
    table = floats(values)
    if not is_binary(table):
        raise DataError("pass@k needs a reward that is 0 or 1 for every answer; drop pass@k or choose another reward")
    known = np.isfinite(table).sum(axis=1)
    right = np.nansum(table, axis=1)
    return floats([pass_at_k(int(n), int(c), k) if n >= k else math.nan for n, c in zip(known, right, strict=True)])


def _known(values: Floats) -> Floats:
    known: Floats = values[np.isfinite(values)]
    return known


def _missing(table: Floats) -> int:
    return int((~np.isfinite(table)).sum())


def _width(values: ArrayLike) -> int:
    table = floats(values)
    return 1 if table.ndim == 1 else table.shape[1]


def _require(units: Floats) -> None:
    if not len(units):
        raise DataError(
            "no known value to take a mean of: every reward is missing. See reward/<source>/missing in the journal."
        )
