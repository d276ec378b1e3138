"""The place that a comparison gave to a training run, as the comparison's journal carries it to MLflow.

The report ranks only algorithms with equal protocols. MLflow's table sorts by a metric that only the ranked runs have, so that it and the
report name the same winner.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.runtime.measures import in_words

RECORD = "ranking"
"""Name of the entry among the tags of a comparison's journal."""
RANKED = "ranked/"
"""Prefix of the headline measure of a ranked run in MLflow."""
NOT_RANKED = "not ranked"


@dataclass(frozen=True)
class Place:
    """The place of a run's algorithm in the last comparison that read the run."""

    measure: str
    """The headline measure of the comparison: sampled_accuracy or greedy_accuracy."""
    words: str
    """`1 of 3`, or `not ranked: ` with the differences of its protocol."""

    @property
    def ranked(self) -> bool:
        """Return True if the comparison ranked the run."""
        return not self.words.startswith(NOT_RANKED)

    def sentence(self) -> str:
        """Return the place as a sentence of the run's description."""
        if self.ranked:
            return f" Its algorithm ranks **{self.words}** by {in_words(self.measure)} in the last comparison."
        return f" **{self.words[0].upper()}{self.words[1:]}**."


def earlier(place: Place) -> Place:
    """Return the place of a run that the last comparison did not read."""
    return Place(place.measure, f"{NOT_RANKED}: not in the last comparison")


def places(
    ranked: Iterable[str], apart: Mapping[str, Iterable[str]], levels: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Return each algorithm's place in words; equal levels share a place.

    Args:
        ranked: the best first.
        apart: the others with their differences.
        levels: by which `ranked` is sorted.
    """
    order = list(ranked)
    width, values = len(str(len(order))), [levels[name] for name in order] if levels else [*range(len(order))]
    found = {
        name: f"{values.index(value) + 1:0{width}d} of {len(order)}" for name, value in zip(order, values, strict=True)
    }
    return found | {name: f"{NOT_RANKED}: {', '.join(cells)}" for name, cells in apart.items()}


def encode(measure: str, by_run: Mapping[str, str]) -> str:
    """Return the entry of a comparison's journal: the headline measure, and the place in words of each run's identity."""
    return json.dumps({"measure": measure, "places": dict(by_run)}, sort_keys=True)


def decode(entry: str) -> dict[str, Place]:
    """Return the place of each run by its identity."""
    tree = json.loads(entry)
    return {run: Place(str(tree["measure"]), str(words)) for run, words in tree["places"].items()}
