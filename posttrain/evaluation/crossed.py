"""Compare algorithms over training seeds and prompts. numpy and scipy.

The unit of replication is a training run. A score is modelled as

    y[a, p, s] = mean[a] + prompt[p] + (algorithm x prompt)[a, p] + run[a, s] + rest[a, p, s]

Runs are nested in their algorithm, and all models answer the same prompts. The variance of a difference of two means has a part
that more prompts reduce and a part that only more runs reduce. Both are estimated from the mean squares of the two-way layout
(method of moments), which is the closed form of the mixed model for a balanced table:

    V = var_p(d[p]) / P  +  max(0, sum over a of (var_s(m[a, s]) - rest[a] / P) / S[a])

`d[p]` is the difference of the prompt's means and `m[a, s]` a run's mean. The first term already holds the rest's share, so it is
taken out of the second. The interval is a t interval with Satterthwaite's degrees of freedom (Satterthwaite 1946), which are
few if the runs differ and only a few seeds were trained.

Example:
    >>> import numpy as np
    >>> a = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    >>> found = crossed_difference(a, np.zeros((4, 1)))
    >>> round(found.value, 6), found.seeds, found.about_training
    (0.75, (3, 1), True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import DataError
from posttrain.evaluation.nearly_equal import FEW, UNBOUNDED, limits
from posttrain.evaluation.statistics import Floats, Resampling, floats, sign_flip

Groups = Sequence[str] | NDArray[Any] | None
CAUTION = 1.3
"""Divides the degrees of freedom of the runs' part. Plugging in estimates truncated at 0 makes them too many with 3 to 5 seeds;
with this factor intervals cover 93 to 97 % over the grid of tests/evaluation/test_crossed.py (without it: 92.7 to 97 %)."""


@dataclass(frozen=True)
class Crossed:
    """A mean or a difference of means, with the parts of its uncertainty.

    Attributes:
        value, low, high: estimate and confidence limits.
        p: two-sided p-value of a zero value.
        df: degrees of freedom of the t distribution.
        from_runs, from_prompts: variances of `value`; their sum is the squared standard error.
        seeds: runs on each side (one number for a mean).
        prompts, missing: prompts used, and prompts left out since some run has no value there.
        about_training: True if an algorithm has two or more runs on every side that is not a fixed model; otherwise the numbers
            describe these runs only, and the interval covers other prompts only.
        groups: number of groups of prompts; None if prompts count as independent.
        rule: which rule of `nearly_equal` set the limits; None if they are those of the t distribution. NaN limits: no interval.
    """

    value: float
    low: float
    high: float
    p: float
    df: float
    from_runs: float
    from_prompts: float
    seeds: tuple[int, ...]
    prompts: int
    missing: int
    about_training: bool
    groups: int | None = None
    rule: str | None = None

    @property
    def standard_error(self) -> float:
        return float(np.sqrt(self.from_runs + self.from_prompts))

    @property
    def method(self) -> str:
        """Name the interval's method for tables."""
        if self.rule and np.isnan(self.low):
            return self.rule
        more = "" if self.rule is None else f", and {self.rule}"
        prompts = "prompts" if self.groups is None else f"{self.groups} groups of prompts"
        if not self.about_training:
            return f"t over {prompts}, this run only{more}"
        over = f"seeds and {prompts}" if self.prompts > 1 else "seeds, this prompt only"
        return f"t over {over}, {self.df:.1f} degrees of freedom{more}"


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of one or many experiments; every array has the experiments' leading shape."""

    value: NDArray[np.float64]
    from_prompts: NDArray[np.float64]
    from_runs: NDArray[np.float64]
    df: NDArray[np.float64]


def moments(a: Floats, b: Floats | None = None) -> Moments:
    """Estimate a difference and its variances from complete tables [..., prompts, seeds].

    Leading dimensions are independent experiments, so that a simulation is one call. Without `b` the mean of `a` is estimated.
    """
    return contrast_moments([a], [1.0]) if b is None else contrast_moments([a, b], [1.0, -1.0])


def contrast_moments(sides: Sequence[Floats], weights: Sequence[float], groups: NDArray[Any] | None = None) -> Moments:
    """Estimate the weighted sum of the sides' means and its variances from complete tables [..., prompts, seeds].

    With `groups`, [prompts], the prompts' part is clustered (2411.00640, equation 4): prompts of one group are not independent, so its
    degrees of freedom come from the groups. The runs' part takes out only what independent prompts would explain, so it is not too small.
    """
    prompts = sides[0].shape[-2]
    by_prompt: Floats = np.asarray(sum(w * side.mean(-1) for w, side in zip(weights, sides, strict=True)))
    value = by_prompt.mean(-1)
    # if all prompts agree, assume that one more prompt would have differed by a single answer
    from_prompts = np.maximum(by_prompt.var(-1, ddof=1), 1.0 / prompts * _unit(sides, weights)) / prompts
    independent = prompts
    if groups is not None:
        from_prompts, independent = np.maximum(from_prompts, _clustered(by_prompt, groups)), len(np.unique(groups))
    excess = [(w**2, *_excess(side)) for w, side in zip(weights, sides, strict=True) if side.shape[-1] > 1]
    from_runs = np.maximum(sum((square * part for square, part, _ in excess), np.zeros_like(value)), 0.0)
    spread = from_prompts**2 / (independent - 1)
    for square, part, seeds in excess:
        spread = spread + CAUTION * np.maximum(square * part, 0.0) ** 2 / (seeds - 1)
    total = (from_prompts + from_runs) ** 2
    # without any variance the degrees of freedom do not matter
    df = np.maximum(np.divide(total, spread, out=np.full_like(total, float(independent - 1)), where=spread > 0), 1.0)
    return Moments(value, from_prompts, from_runs, df)


def _clustered(by_prompt: Floats, groups: NDArray[Any]) -> Floats:
    """Return the variance of the mean of [..., prompts] in groups, with the factor G / (G - 1) for few groups."""
    names, member = np.unique(groups, return_inverse=True)
    deviations = by_prompt - by_prompt.mean(-1, keepdims=True)
    sums = deviations @ (member[:, None] == np.arange(len(names))[None, :]).astype(np.float64)
    variance: Floats = np.square(sums).sum(-1) / by_prompt.shape[-1] ** 2 * len(names) / (len(names) - 1)
    return variance


def _unit(sides: Sequence[Floats], weights: Sequence[float]) -> float:
    """Squared step of the score: (weight / seeds)² for the larger number of seeds if scores are 0 or 1, else 0."""
    binary = all(bool(np.isin(side, (0.0, 1.0)).all()) for side in sides)
    return (max(map(abs, weights)) / max(side.shape[-1] for side in sides)) ** 2 if binary else 0.0


def _excess(table: Floats) -> tuple[NDArray[np.float64], int]:
    """Return the variance of the mean over runs beyond the part that the rest explains, [...], and the number of seeds."""
    prompts, seeds = table.shape[-2:]
    runs = table.mean(-2)
    rest = table - table.mean(-1, keepdims=True) - runs[..., None, :] + table.mean((-1, -2), keepdims=True)
    mean_square = (rest**2).sum((-1, -2)) / ((prompts - 1) * (seeds - 1))
    return (runs.var(-1, ddof=1) - mean_square / prompts) / seeds, seeds


def crossed_difference(
    a: ArrayLike,
    b: ArrayLike,
    confidence: float = 0.95,
    *,
    fixed_b: bool = True,
    groups: Groups = None,
    least: float = UNBOUNDED,
) -> Crossed:
    """Compare two models or algorithms on the same prompts.

    Args:
        a, b: scores [prompts, seeds], NaN if missing; a prompt that any run has no score for is left out.
        confidence: of the interval.
        fixed_b: a single column of `b` is a fixed model (the start that every run shares), not a sample of trainings.
        groups: the group of each prompt, such as the text that a question is about; None if prompts are independent.
        least: least possible difference, -1 for shares, as in `nearly_equal`.

    Raises:
        DataError: the tables have different prompts, no prompt is complete (or one, of single runs), or all are in one group.
    """
    left, right = _table(a), _table(b)
    if len(left) != len(right):
        raise DataError(f"a comparison needs the same prompts on both sides; got {len(left)} and {len(right)}")
    complete = np.isfinite(left).all(1) & np.isfinite(right).all(1)
    seeds = (left.shape[1], right.shape[1])
    trained = seeds[0] > 1 and (seeds[1] > 1 or fixed_b)
    sides = [left[complete], right[complete]]
    missing = int((~complete).sum())
    return _crossed(sides, [1.0, -1.0], confidence, seeds, missing, trained, _of(groups, complete), least)


def crossed_mean(a: ArrayLike, confidence: float = 0.95, groups: Groups = None, least: float = UNBOUNDED) -> Crossed:
    """Estimate an algorithm's mean score over seeds and prompts from [prompts, seeds]. Raises DataError as crossed_difference.

    `least` is 0 for shares, as in `nearly_equal`.
    """
    table = _table(a)
    complete = np.isfinite(table).all(1)
    seeds = table.shape[1]
    found = [table[complete]]
    missing = int((~complete).sum())
    return _crossed(found, [1.0], confidence, (seeds,), missing, seeds > 1, _of(groups, complete), least)


def _of(groups: Groups, complete: ArrayLike) -> NDArray[Any] | None:
    """Return the groups of the complete prompts."""
    return None if groups is None else np.asarray(groups)[np.asarray(complete)]


def crossed_contrast(
    tables: Sequence[ArrayLike], weights: Sequence[float], confidence: float = 0.95, groups: Groups = None
) -> Crossed:
    """Estimate a weighted sum of algorithms' means, such as the difference of two differences.

    Args:
        tables: scores [prompts, seeds] of each algorithm; one column is a fixed model.
        weights: one for each table; a difference has 1 and -1.
        confidence: of the interval.
        groups: the group of each prompt; None if prompts are independent.

    Raises:
        DataError: as crossed_difference.
    """
    sides = [_table(table) for table in tables]
    if len({len(side) for side in sides}) > 1:
        counts = " and ".join(str(len(side)) for side in sides)
        raise DataError(f"a comparison needs the same prompts on all sides; got {counts}")
    complete = np.all([np.isfinite(side).all(1) for side in sides], axis=0)
    seeds = tuple(side.shape[1] for side in sides)
    found, missing = [side[complete] for side in sides], int((~complete).sum())
    return _crossed(found, weights, confidence, seeds, missing, max(seeds) > 1, _of(groups, complete))


def _crossed(
    sides: Sequence[Floats],
    weights: Sequence[float],
    confidence: float,
    seeds: tuple[int, ...],
    missing: int,
    trained: bool,
    groups: NDArray[Any] | None = None,
    least: float = UNBOUNDED,
) -> Crossed:
    prompts = len(sides[0])
    if prompts < 1 or prompts == max(seeds) == 1:
        raise DataError(
            f"only {prompts} of {prompts + missing} prompts have a score from every run; an interval needs 2 prompts, or 2 seeds. See"
            " reward/<source>/missing in the journals, or evaluate on more prompts."
        )
    names, member = (None, None) if groups is None else np.unique(groups, return_inverse=True)
    if names is not None and len(names) == 1:
        raise DataError(
            "all prompts are in one group, so that nothing shows how other prompts would differ. Name a column with several values in"
            " evaluation.groups, or remove it."
        )
    from scipy import stats  # not above: it takes half a second, and a flow imports this module only for its types

    found = contrast_moments(sides, weights, groups) if prompts > 1 else _over_runs(sides, weights)
    value, error, df = float(found.value), float(np.sqrt(found.from_prompts + found.from_runs)), float(found.df)
    reach = float(stats.t.ppf(0.5 + confidence / 2, df)) * error
    units: Floats = np.asarray(sum(w * side.mean(-1) for w, side in zip(weights, sides, strict=True)))
    if member is not None:
        units = np.bincount(member, weights=units) / np.bincount(member)
    low, high, rule = limits(units, value - reach, value + reach, confidence, least)
    # equal values are as likely with the opposite sign only together with all others
    p = float(2 * stats.t.sf(abs(value) / error, df)) if error > 0 else 1.0 if value == 0 else 2.0 ** (1 - len(units))
    if rule is not None and np.count_nonzero(units) < FEW:
        p = max(p, sign_flip(units, Resampling()))  # t is too sure of a few differences
    return Crossed(
        value, low, high, p, df, float(found.from_runs), float(found.from_prompts), seeds, prompts, missing,
        trained, None if names is None else len(names), rule,
    )  # fmt: skip


def _over_runs(sides: Sequence[Floats], weights: Sequence[float]) -> Moments:
    """Estimate a contrast over one prompt, [1, seeds] each: Welch's variance over runs. Sides with one run are fixed models."""
    value = sum(w * side.mean() for w, side in zip(weights, sides, strict=True))
    several = [(w, side) for w, side in zip(weights, sides, strict=True) if side.shape[-1] > 1]
    parts = [(w**2 * side.var(ddof=1) / side.size, side.size - 1) for w, side in several]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    df = variance**2 / spread if spread > 0 else min(freedom for _, freedom in parts)
    return Moments(*(np.asarray(number, dtype=np.float64) for number in (value, 0.0, variance, df)))


def two_way_bootstrap(a: ArrayLike, b: ArrayLike, resamples: int = 2000, seed: int = 0) -> Floats:
    """Return `resamples` differences with prompts and, within each side, runs drawn with replacement (2009.02493).

    Runs' deviations from their mean are stretched by sqrt(S / (S - 1)), so that few seeds do not shrink the spread.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    left, right = _table(a), _table(b)
    complete = np.isfinite(left).all(1) & np.isfinite(right).all(1)
    sides = [_stretched(left[complete]), _stretched(right[complete])]
    drawn = np.empty(resamples)
    prompts = int(complete.sum())
    for i in range(resamples):
        rows = generator.integers(0, prompts, prompts)
        means = [side[rows][:, generator.integers(0, side.shape[1], side.shape[1])].mean() for side in sides]
        drawn[i] = means[0] - means[1]
    return drawn


def _stretched(table: Floats) -> Floats:
    seeds = table.shape[1]
    if seeds < 2:
        return table
    runs = table.mean(0, keepdims=True)
    stretched: Floats = table + (np.sqrt(seeds / (seeds - 1)) - 1) * (runs - runs.mean())
    return stretched


def clustered_standard_error(scores: ArrayLike, clusters: ArrayLike) -> float:
    """Return the standard error of the mean if prompts come in groups (2411.00640, equation 4).

    sqrt(sum over groups of (sum of the group's deviations)²) / n; equal to the plain one if every group has one prompt.
    """
    values, groups = floats(scores), np.asarray(clusters)
    deviations = values - values.mean()
    sums = [float(deviations[groups == group].sum()) for group in np.unique(groups)]
    return float(np.sqrt(np.square(sums).sum()) / len(values))


@dataclass(frozen=True)
class Spread:
    """Variances of one run's score: between runs of one algorithm, and between prompts for a difference of two algorithms."""

    run: float
    prompt: float
    rest: float

    @classmethod
    def of(cls, a: ArrayLike, b: ArrayLike, groups: Groups = None) -> Spread:
        """Estimate from two algorithms' tables [prompts, seeds] with at least 2 seeds each (a pilot).

        If prompts come in groups, `prompt` is the variance that as many independent prompts would need for the clustered error.
        """
        tables = [_table(a), _table(b)]
        if min(table.shape[1] for table in tables) < 2:
            raise DataError("a pilot needs at least 2 seeds of each algorithm to see how much trainings differ")
        parts = [_excess(table) for table in tables]
        rests = [_rest(table) for table in tables]
        run = max(0.0, float(np.mean([part * seeds for part, seeds in parts])))
        rest = float(np.mean(rests))
        seeds = [table.shape[1] for table in tables]
        by_prompt = tables[0].mean(1) - tables[1].mean(1)
        between = float(by_prompt.var(ddof=1))
        if groups is not None:
            between = max(between, len(by_prompt) * float(_clustered(by_prompt, np.asarray(groups))))
        prompt = max(0.0, between - rest * sum(1 / n for n in seeds))
        return cls(run, prompt, rest)

    def smallest_difference(self, seeds: int, prompts: int, power: float = 0.8, confidence: float = 0.95) -> float:
        """Return the difference of two algorithms that an experiment of this size shows with the given power."""
        from scipy import stats

        runs, rows = 2 * self.run / seeds, (self.prompt + 2 * self.rest / seeds) / prompts
        df = _freedom(runs, rows, seeds, prompts)
        reach = float(stats.t.ppf(0.5 + confidence / 2, df) + stats.t.ppf(power, df))
        return reach * float(np.sqrt(runs + rows))

    def seeds_for(self, difference: float, prompts: int, power: float = 0.8, most: int = 1000) -> int | None:
        """Return the fewest seeds an algorithm that show `difference`, or None if `most` do not."""
        found = (n for n in range(2, most + 1) if self.smallest_difference(n, prompts, power) <= difference)
        return next(found, None)


def _freedom(runs: float, rows: float, seeds: int, prompts: int) -> float:
    if runs + rows == 0:
        return float(prompts - 1)
    spread = rows**2 / (prompts - 1) + CAUTION * 2 * (runs / 2) ** 2 / max(seeds - 1, 1)
    return max(1.0, (runs + rows) ** 2 / spread)


def _rest(table: Floats) -> float:
    prompts, seeds = table.shape
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return float((rest**2).sum() / ((prompts - 1) * (seeds - 1)))


def _table(values: Any) -> Floats:
    table = floats(values)
    return table[:, None] if table.ndim == 1 else table
