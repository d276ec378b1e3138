"""Measure how often the comparison calls copies of one algorithm different (A/A), and the smallest difference it could show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from posttrain.evaluation.crossed import Groups, Spread, crossed_difference, moments
from posttrain.evaluation.statistics import Floats, Resampling, paired, wilson

SPLITS = 200
"""Most splits of one algorithm's seeds into two sides; all of them if there are fewer."""
SIMULATED = 20_000


@dataclass(frozen=True)
class Rate:
    """The share of A/A comparisons that were called different, with a 95 % interval.

    Attributes:
        seeds: runs on each side.
        pairs: comparisons made. They share runs, so fewer of them are independent.
        independent: pairs that share no run; the interval is Wilson's for so many.
    """

    method: str
    seeds: int
    different: int
    pairs: int
    independent: int

    @property
    def share(self) -> float:
        return self.different / self.pairs

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.share * self.independent, self.independent)


def rates(tables: Sequence[Floats], sides: Sequence[int], draws: Resampling, groups: Groups = None) -> list[Rate]:
    """Compare every algorithm with itself: [prompts, runs] tables, split into two sides of `k` runs for each k of `sides`.

    Both methods judge the same pairs: the crossed one, whose unit is the run, and the older one over prompts only. One run a
    side has no crossed test. Sides that no algorithm has runs for are left out. `groups` are those of the prompts, for the crossed method.
    """
    found = []
    for k in sides:
        pairs = [(table[:, a], table[:, b]) for table in tables for a, b in splits(table.shape[1], k, draws.seed)]
        independent = sum(table.shape[1] // (2 * k) for table in tables)
        if not pairs:
            continue
        alpha = 1 - draws.confidence
        if k > 1:
            crossed = sum(crossed_difference(a, b, draws.confidence, groups=groups).p < alpha for a, b in pairs)
            found.append(Rate("seeds and prompts", k, crossed, len(pairs), independent))
        alone = sum(paired(a, b, draws).p < alpha for a, b in pairs)
        found.append(Rate("prompts only", k, alone, len(pairs), independent))
    return found


def splits(runs: int, k: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Return pairs of disjoint sets of k runs: all single pairs for k = 1, else up to SPLITS distinct random ones, seeded."""
    if runs < 2 * k:
        return []
    if k == 1:
        return [([a], [b]) for a, b in combinations(range(runs), 2)]
    generator = np.random.Generator(np.random.PCG64([seed, k]))
    seen: dict[str, tuple[list[int], list[int]]] = {}
    for _ in range(4 * SPLITS):
        order = generator.permutation(runs)
        halves = sorted([sorted(order[:k].tolist()), sorted(order[k : 2 * k].tolist())])
        seen.setdefault(str(halves), (halves[0], halves[1]))
        if len(seen) == SPLITS:
            break
    return list(seen.values())


def simulated(spread: Spread, seeds: int, prompts: int, confidence: float, seed: int = 0) -> float:
    """Return the share of SIMULATED experiments with these variances and no difference that are called different."""
    generator = np.random.Generator(np.random.PCG64([seed, seeds]))
    hits = total = 0
    while total < SIMULATED:
        sides = [_drawn(generator, spread, seeds, prompts, 500) for _ in range(2)]
        found = moments(sides[0], sides[1])
        reach = stats.t.ppf(0.5 + confidence / 2, found.df) * np.sqrt(found.from_prompts + found.from_runs)
        hits, total = hits + int((np.abs(found.value) > reach).sum()), total + 500
    return hits / total


def _drawn(generator: np.random.Generator, spread: Spread, seeds: int, prompts: int, n: int) -> Floats:
    drawn: Floats = (
        generator.normal(0, np.sqrt(spread.prompt / 2), (n, prompts, 1))
        + generator.normal(0, np.sqrt(spread.run), (n, 1, seeds))
        + generator.normal(0, np.sqrt(spread.rest), (n, prompts, seeds))
    )
    return drawn


def power_lines(spread: Spread, seeds: int, prompts: int) -> Iterator[str]:
    """Report the differences that the present seeds and prompts show with 80 % power, and the seeds for 2, 5 and 10 points."""
    if not spread.run + spread.prompt + spread.rest > 0:  # NaN over one prompt
        yield "the pilot's scores do not differ over prompts and runs, so nothing shows which difference could be found"
        return
    if seeds > 1:
        smallest = 100 * spread.smallest_difference(seeds, prompts)
        yield f"{seeds} seeds an algorithm and {prompts} prompts show a difference of {smallest:.1f} points with 80 % power"
    else:
        yield "1 seed an algorithm: no statement about training is possible"
    for points in (2, 5, 10):
        needed = spread.seeds_for(points / 100, prompts)
        yield f"{points} points: " + (
            f"{needed} seeds" if needed else "more than 1,000 seeds; evaluate on more prompts instead"
        )
