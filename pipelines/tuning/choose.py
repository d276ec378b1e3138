"""Choose the best trial of each algorithm on the selection prompts, and report it on the other ones.

The winner of several trials has been lucky: its score on the prompts that chose it is too high (the winner's curse). So the page has
three numbers: the winner's score on the selection prompts, the same run on the other prompts, and runs with new seeds there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.report.load import Predictions, predictions
from pipelines.runtime.publish import ARTIFACTS
from pipelines.tuning.trials import Trial
from posttrain.errors import DataError
from posttrain.evaluation.crossed import Crossed, crossed_mean
from posttrain.evaluation.statistics import Floats, per_prompt


@dataclass(frozen=True)
class Choice:
    """The best trial of an algorithm. Scores are shares from 0 to 1 of the selection prompts, if not said otherwise."""

    best: Trial
    scores: list[float]
    """Score of every trial."""
    elsewhere: float
    """Score of the best trial's run on the report's prompts."""


@dataclass(frozen=True)
class Reported:
    """The best trial with new training seeds on the report's prompts, next to the choice."""

    choice: Choice
    fresh: Crossed

    @property
    def curse(self) -> float:
        """Return by how much the score that won exceeds the score with new seeds and prompts."""
        return max(self.choice.scores) - self.fresh.value


def split(prompt_ids: Sequence[int], share: float, seed: int, groups: Sequence[str] | None = None) -> np.ndarray:
    """Return a mask [prompts], True for selection: `share` of the prompts, at least 2 on each side.

    Prompts of one group are on one side, so that no group both chooses and reports; `share` is then that of the groups.

    Raises DataError if there are fewer than 4 prompts or groups.
    """
    units = [str(i) for i in range(len(prompt_ids))] if groups is None else list(groups)
    distinct, kind = [*dict.fromkeys(units)], "prompts" if groups is None else "groups of prompts"
    if len(distinct) < 4:
        raise DataError(
            f"{len(distinct)} evaluation {kind} cannot be split for tuning; 4 are needed, some hundred make sense"
        )
    count = min(max(2, round(share * len(distinct))), len(distinct) - 2)
    drawn = random.Random(f"selection/{seed}").sample(range(len(distinct)), count)
    chosen = {distinct[i] for i in drawn}
    return np.array([unit in chosen for unit in units])


def choose(folder: Path, found: Sequence[Trial], seed: int, accuracy: str, mask: np.ndarray) -> Choice:
    """Choose the trial with the highest mean on the selection prompts; of equal ones the first."""
    tables = [scores(folder, f"{trial.name}-{seed}", accuracy) for trial in found]
    means = [float(np.nanmean(table[mask])) for table in tables]
    best = max(range(len(found)), key=lambda i: means[i])
    return Choice(found[best], means, float(np.nanmean(tables[best][~mask])))


def report(folder: Path, choice: Choice, seeds: Sequence[int], accuracy: str, mask: np.ndarray) -> Reported:
    """Score the chosen trial with new seeds on the report's prompts."""
    columns = [scores(folder, f"{choice.best.name}-{seed}", accuracy) for seed in seeds]
    groups = answers(folder, f"{choice.best.name}-{seeds[0]}").groups
    rest = None if groups is None else np.asarray(groups)[~mask]
    return Reported(choice, crossed_mean(np.stack(columns, axis=-1)[~mask], groups=rest))


def scores(folder: Path, model: str, accuracy: str) -> Floats:
    """Return the mean reward of the sampled answers to each prompt, [prompts]."""
    return per_prompt(answers(folder, model).numbers[f"reward_{accuracy}"][:, 1:])


def answers(folder: Path, model: str) -> Predictions:
    """Return a model's evaluated answers. Raises DataError if it has not been evaluated."""
    return predictions(folder / "runs" / "evaluate" / model / ARTIFACTS / "predictions.parquet")
