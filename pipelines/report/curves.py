"""Draw the training curves: every algorithm's journal on the same axes, and reward against KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtrit

from pipelines.config.effective import effective_parameters
from pipelines.report.analysis import Question
from pipelines.report.load import Results
from pipelines.report.style import Look, figure, legend_below
from posttrain.evaluation.statistics import Floats

KL = "kl/ref_k1"
WIDTH = 5.6
Z = 1.96
"""The normal quantile of a 95 % interval."""
WINDOW = 5
"""Steps in the running mean of the over-optimisation plot; single steps are drawn behind it."""

Curve = tuple[Floats, Floats]


def metrics_shown(question: Question) -> dict[str, str]:
    """Return the plot title of each journal metric, in the order of the page."""
    rewards = [question.accuracy, *(name for name in question.rewards if name != question.accuracy)]
    titles = {
        f"reward/{name}/mean": f"True reward: {name}" if name == question.accuracy else f"Reward: {name}"
        for name in rewards
    }
    return titles | {
        KL: "KL to the reference (nats per response)",
        "entropy": "Entropy (nats per token)",
        "length/mean": "Length (tokens per response)",
        "length/truncated": "Truncated responses (share)",
        "preference/accuracy": "Accuracy on training pairs",
        "preference/margin": "Margin on training pairs",
    }


def curves_of(results: Results, algorithm: str, metric: str) -> list[Curve]:
    """Return one curve per seed that logged the metric."""
    runs = [model.training for model in results.of(algorithm)]
    return [run.curves[metric] for run in runs if run is not None and metric in run.curves]


def seed_mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds at the steps that every seed logged."""
    tables = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    return np.asarray(shared), np.asarray([np.mean([table[step] for table in tables]) for step in shared])


def learning(results: Results, metric: str, look: Look) -> Figure:
    """Plot one metric against training steps; thin lines are seeds, the thick line is their mean."""
    drawn, (axes,) = figure(WIDTH, 3.3)
    for name in results.algorithms:
        curves = curves_of(results, name, metric)
        if not curves:
            continue
        if len(curves) > 1:
            for steps, values in curves:
                axes.plot(steps, values, color=look.colour(name), linewidth=0.8, alpha=0.35)
        steps, values = seed_mean(curves)
        _band(axes, results, name, metric, look)
        axes.plot(steps, values, color=look.colour(name), linestyle=look.dashes(name), linewidth=1.8, label=name)
        _mark_end(axes, steps, values, name, look)
    axes.set_xlabel("training step")
    legend_below(drawn)
    return drawn


def _band(axes: Axes, results: Results, name: str, metric: str, look: Look) -> None:
    """Shade a 95 % interval: over seeds if there are several, else over the answers of each step if their spread was logged."""
    curves = curves_of(results, name, metric)
    if len(curves) > 1:
        steps, low, high = seed_band(curves)
    else:
        spread = curves_of(results, name, metric.removesuffix("/mean") + "/std") if metric.endswith("/mean") else []
        answers = answers_per_step(results, name)
        if not spread or not answers:
            return
        steps, values = curves[0]
        half = Z * np.interp(steps, *spread[0]) / np.sqrt(answers)
        low, high = values - half, values + half
    axes.fill_between(steps, low, high, color=look.colour(name), alpha=0.15, linewidth=0)


def seed_band(curves: Sequence[Curve]) -> tuple[Floats, Floats, Floats]:
    """Return steps and a 95 % t interval of the mean over seeds at the steps that every seed logged."""
    tables = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in curves]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    values = np.asarray([[table[step] for table in tables] for step in shared])
    n = len(tables)
    half = float(stdtrit(n - 1, 0.975)) * values.std(axis=1, ddof=1) / np.sqrt(n)
    return np.asarray(shared), values.mean(axis=1) - half, values.mean(axis=1) + half


def answers_per_step(results: Results, name: str) -> int:
    """Return the number of answers that one step of an algorithm samples; 0 if it is unknown."""
    run = results.of(name)[0].training
    params = {} if run is None else effective_parameters("align", {"algorithm": name}, run.params)
    return int(params.get("prompts_per_step", 0)) * int(params.get("samples_per_prompt", 0))


def logged_by(results: Results, metric: str) -> list[str]:
    """Return the algorithms that logged the metric."""
    return [name for name in results.algorithms if curves_of(results, name, metric)]


def on_policy(results: Results, question: Question) -> list[str]:
    """Return the algorithms that sampled during training, so that they logged both the true reward and KL."""
    true = f"reward/{question.accuracy}/mean"
    return [name for name in logged_by(results, KL) if curves_of(results, name, true)]


def over_optimisation(results: Results, question: Question, look: Look) -> Figure:
    """Plot true reward (top) and reward-model score (below) against KL to the reference during training."""
    sources = [question.accuracy, *question.reward_models]
    drawn, panels = figure(6.0, 0.6 + 2.5 * len(sources), len(sources))
    for axes, source in zip(panels, sources, strict=True):
        for name in on_policy(results, question):
            rewards = curves_of(results, name, f"reward/{source}/mean")
            if rewards:
                _trajectory(axes, seed_mean(curves_of(results, name, KL)), seed_mean(rewards), name, look)
        axes.set_title(f"True reward ({source})" if source == question.accuracy else f"Reward-model score ({source})")
        axes.sharex(panels[0])
    panels[-1].set_xlabel("KL to the reference policy, nats per response (k1)")
    legend_below(drawn, *panels[0].get_legend_handles_labels())
    return drawn


def _trajectory(axes: Axes, kl: Curve, reward: Curve, name: str, look: Look) -> None:
    """Plot one algorithm's reward against its KL."""
    shared, left, right = np.intersect1d(kl[0], reward[0], return_indices=True)
    if not len(shared):
        return
    x, y, colour = kl[1][left], reward[1][right], look.colour(name)
    axes.plot(x, y, "o", color=colour, markersize=2.6, alpha=0.4, markeredgewidth=0)
    x, y = running_mean(x), running_mean(y)
    axes.plot(x, y, color=colour, linestyle=look.dashes(name), linewidth=1.8, label=name)
    axes.plot(x[0], y[0], look.marker(name), color=colour, markersize=7, markerfacecolor=look.ground)
    axes.plot(x[-1], y[-1], look.marker(name), color=colour, markersize=7)


def running_mean(values: Floats, window: int = WINDOW) -> Floats:
    """Return the mean of the last `window` values at each position, fewer at the start; missing values are skipped."""
    known, sums = np.isfinite(values), np.where(np.isfinite(values), values, 0.0)
    starts = [max(0, i + 1 - window) for i in range(len(values))]
    counts = [int(known[start : i + 1].sum()) for i, start in enumerate(starts)]
    return np.asarray(
        [sums[start : i + 1].sum() / counts[i] if counts[i] else np.nan for i, start in enumerate(starts)]
    )


def _mark_end(axes: Axes, steps: Floats, values: Floats, name: str, look: Look) -> None:
    """Mark the last known value of a curve."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known):
        axes.plot(steps[known[-1]], values[known[-1]], look.marker(name), color=look.colour(name), markersize=6)
