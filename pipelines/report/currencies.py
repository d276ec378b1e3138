"""Draw the true reward along training against each budget: tokens sampled, tokens trained on, and optimiser steps."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pipelines.report.analysis import Question
from pipelines.report.curves import Curve, on_policy, running_mean, seed_mean
from pipelines.report.load import Results, Training, optimiser_steps
from pipelines.report.protocol import CURRENCIES, Currency
from pipelines.report.style import Look, figure, legend_below

METRICS = {"tokens_sampled": "tokens/sampled", "tokens_trained": "tokens/trained"}
LOGGED: tuple[Currency, ...] = ("tokens_sampled", "tokens_trained", "optimiser_steps")
"""The currencies of the journals. Curves against wall time are in `wall_time.py`, since they depend on the machine."""


def spent(run: Training, algorithm: str, currency: Currency) -> Curve | None:
    """Return a run's spending after each of its steps, or None if it was not logged.

    Optimiser steps are an equal share of the run's for every training step.
    """
    if currency in METRICS:
        return run.curves.get(METRICS[currency])
    steps, _ = run.curves["loss"]
    return steps, steps * (optimiser_steps(run, algorithm) / run.summary["steps"])


def curve(results: Results, algorithm: str, metric: str, currency: Currency) -> Curve | None:
    """Return (spent, running mean of the metric), both means over seeds, or None if a seed did not log one of them."""
    runs = [model.training for model in results.of(algorithm) if model.training is not None]
    budgets = [found for run in runs if (found := spent(run, algorithm, currency)) is not None]
    levels = [run.curves[metric] for run in runs if metric in run.curves]
    if not runs or len(budgets) < len(runs) or len(levels) < len(runs):
        return None
    (steps, x), (others, y) = seed_mean(budgets), seed_mean(levels)
    _, left, right = np.intersect1d(steps, others, return_indices=True)
    return x[left], running_mean(y)[right]


def against_budgets(results: Results, question: Question, look: Look) -> Figure:
    """Plot the true reward of the sampled answers of each step, one panel per budget."""
    drawn, panels = figure(6.0, 0.6 + 2.3 * len(LOGGED), len(LOGGED))
    for axes, currency in zip(panels, LOGGED, strict=True):
        for name in on_policy(results, question):
            found = curve(results, name, f"reward/{question.accuracy}/mean", currency)
            if found is not None:
                axes.plot(*found, color=look.colour(name), linestyle=look.dashes(name), linewidth=1.8, label=name)
        axes.set_xlabel(CURRENCIES[currency])
        axes.set_ylabel(f"true reward ({question.accuracy})")
    legend_below(drawn, *panels[0].get_legend_handles_labels())
    return drawn
