"""Name the two measures of accuracy, so that report, MLflow, model card and metrics.json use the same words.

`sampled_accuracy` is the mean of the reward `evaluation.accuracy` over the sampled answers, `greedy_accuracy` over the greedy ones.
`report.headline` chooses the one that ranks the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

V = TypeVar("V")
Headline = Literal["sampled", "greedy"]
SAMPLED, GREEDY = "sampled_accuracy", "greedy_accuracy"
_OLD = {"accuracy": GREEDY, "accuracy_low": f"{GREEDY}_low", "accuracy_high": f"{GREEDY}_high"}
"""Names in evaluations that were stored before both measures had a name."""
_ENDS = {"mean": SAMPLED, "low": f"{SAMPLED}_low", "high": f"{SAMPLED}_high"}


def headline_name(headline: str) -> str:
    """Return the name of the headline measure for a value of `report.headline`."""
    return f"{headline}_accuracy"


def in_words(name: str) -> str:
    """Return the name of a measure in words: `sampled accuracy`."""
    return name.replace("_", " ")


def with_measures(results: Mapping[str, V], judge: str | None) -> dict[str, V]:
    """Return the results of an evaluation with both measures under their names, and neither of them under a second one.

    `judge` is `evaluation.accuracy` of the evaluation. Stored results with the old names are renamed.

    Example:
        >>> with_measures({"accuracy": 0.5, "reward/answer/mean": 0.25, "entropy": 1.0}, "answer")
        {'greedy_accuracy': 0.5, 'sampled_accuracy': 0.25, 'entropy': 1.0}
    """
    names = _OLD | {f"reward/{judge}/{end}": name for end, name in _ENDS.items()}
    return {names.get(name, name): value for name, value in results.items()}
