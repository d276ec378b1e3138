"""State which checkpoint of each run was evaluated, if `align.best_checkpoint` chose it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.report.load import Results

RULE = "align.best_checkpoint."


@dataclass(frozen=True)
class ChosenStep:
    """The step of one run that is evaluated, and its scores.

    Attributes:
        steps: of the run.
        measured: steps of which it is the best.
        selection: score on the problems that chose, which is too high, since it is the best of several.
        evaluation: greedy accuracy of the same weights on the evaluation prompts.
    """

    algorithm: str
    seed: int
    step: int
    steps: int
    measured: int
    selection: float
    evaluation: float


@dataclass(frozen=True)
class Rule:
    """The rule as the runs recorded it."""

    every_steps: int
    problems: int
    reward: str


def rule(results: Results) -> Rule | None:
    """Return the rule that chose the evaluated steps, or None if they are the last ones."""
    for model in results.models:
        params = model.training.params if model.training is not None else {}
        if params.get(RULE + "every_steps") is not None:
            return Rule(*(params[RULE + name] for name in ("every_steps", "problems", "reward")))
    return None


def chosen_steps(results: Results, accuracy: str) -> list[ChosenStep]:
    """Return the evaluated step of every run, in the order of the report; none if it is the last one by rule."""
    found = []
    for model in results.models:
        if model.training is None or model.seed is None or "selection/step" not in model.training.summary:
            continue
        summary = model.training.summary
        step, steps, measured = (round(summary[key]) for key in ("selection/step", "steps", "selection/measured"))
        greedy = float(np.nanmean(model.predictions.numbers[f"reward_{accuracy}"][:, 0]))
        found.append(ChosenStep(model.group, model.seed, step, steps, measured, summary["selection/score"], greedy))
    return found
