"""How well a reward model's confidence fits its accuracy, and its order fits graded scores.

Example:
    >>> bins = calibration_curve([2.0, 2.0, -2.0, 0.1], bins=2)
    >>> [(b.count, round(b.confidence, 3), b.accuracy) for b in bins]
    [(1, 0.525, 1.0), (3, 0.881, 0.6666666666666666)]
    >>> round(calibration_error(bins), 3), rank_correlation([1, 2, 3], [10, 20, 90])
    (0.279, 1.0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence: their number, mean confidence, and share on which the better answer scores higher."""

    count: int
    confidence: float
    accuracy: float


def calibration_curve(gaps: Sequence[float], bins: int = 10) -> list[Bin]:
    """Return the pairs in bins of equal width over the confidence sigma(|gap|), from 1/2 to 1; empty bins are left out.

    Args:
        gaps: score of the better answer minus score of the worse one. A tie counts as half right.
    """
    members: dict[int, list[tuple[float, float]]] = {}
    for gap in gaps:
        confidence = 1 / (1 + math.exp(-abs(gap)))
        right = 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        members.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, right))
    return [
        Bin(len(pairs), sum(c for c, _ in pairs) / len(pairs), sum(r for _, r in pairs) / len(pairs))
        for _, pairs in sorted(members.items())
    ]


def calibration_error(curve: Sequence[Bin]) -> float:
    """Return the expected calibration error (1706.04599): |accuracy - confidence|, averaged over the pairs."""
    return sum(b.count * abs(b.accuracy - b.confidence) for b in curve) / sum(b.count for b in curve)


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Return Spearman's correlation; tied values share their mean rank. NaN if one side is constant."""
    x, y = _ranks(left), _ranks(right)
    mean = (len(x) + 1) / 2
    spread = math.sqrt(sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y))
    return sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for i in order[start:stop]:
            ranks[i] = (start + 1 + stop) / 2
        start = stop
    return ranks
