"""Agreement between annotators, and their biases. Needs only the standard library.

Example:
    Two annotators judge four answers and differ on one. Three of the four pairs agree, and chance would give 18/56 disagreement
    x 8/7, so alpha = 1 - (1/4) / (30/56):

    >>> units = [["a", "a"], ["b", "b"], ["a", "a"], ["a", "b"]]
    >>> round(krippendorff_alpha(units), 4), round(cohen_kappa([(x, y) for x, y in units]), 4)
    (0.5333, 0.5)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

Distance = Callable[[Any, Any], float]


def nominal(a: Hashable, b: Hashable) -> float:
    """Return 0 for equal labels and 1 for different ones."""
    return float(a != b)


def interval(a: float, b: float) -> float:
    """Return the squared difference of two scores."""
    return (a - b) ** 2


def krippendorff_alpha(units: Iterable[Sequence[Any]], distance: Distance = nominal) -> float | None:
    """Return Krippendorff's alpha: 1 is full agreement, 0 is agreement by chance, below 0 is systematic disagreement.

    Args:
        units: the labels that each item received, from any number of annotators. Items with fewer than two are left out.
        distance: the difference of two labels, 0 if they are equal.

    Returns:
        1 - observed / expected disagreement; None if no item has two labels, or all labels are equal.
    """
    pairable = [list(unit) for unit in units if len(unit) > 1]
    labels = [label for unit in pairable for label in unit]
    observed = sum(_mean_distance(unit, distance) * len(unit) for unit in pairable)
    expected = _mean_distance(labels, distance) * len(labels) if labels else 0.0
    return None if expected == 0 else 1 - observed / expected


def _mean_distance(labels: Sequence[Any], distance: Distance) -> float:
    """Return the mean distance over all ordered pairs of different places."""
    counts = Counter(labels)
    total = sum(n * m * distance(a, b) for a, n in counts.items() for b, m in counts.items())
    return total / (len(labels) * (len(labels) - 1))


def cohen_kappa(pairs: Iterable[tuple[Hashable, Hashable]]) -> float | None:
    """Return Cohen's kappa of two annotators' labels for the same items; None without items, or if chance agreement is 1."""
    both = list(pairs)
    if not both:
        return None
    observed = sum(a == b for a, b in both) / len(both)
    first, second = Counter(a for a, _ in both), Counter(b for _, b in both)
    expected = sum(first[label] * second[label] for label in first) / len(both) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)
