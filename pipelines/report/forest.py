"""Draw the plots of the evaluation: estimates with their intervals, one row per model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipelines.report.analysis import Comparison
from pipelines.report.load import SFT
from pipelines.report.style import Look, figure, legend_below
from pipelines.report.words import ranked, unranked
from posttrain.evaluation.runs import performance_profile
from posttrain.evaluation.statistics import Interval

WIDTH = 6.0
LEVELS = 201
"""Levels at which a performance profile is drawn."""


def accuracy(comparison: Comparison, look: Look) -> Figure:
    """Plot the accuracy of every model; hollow marks are not ranked, small marks are single seeds, the line is SFT."""
    summaries, left_out = comparison.summaries, unranked(comparison)
    drawn, (axes,) = figure(WIDTH, 1.1 + 0.42 * len(summaries))
    _forest(axes, [(s.name, s.headline) for s in summaries], look, filled=[s.name not in left_out for s in summaries])
    for row, summary in enumerate(summaries):
        if len(summary.by_seed) > 1:
            seeds = [row + 0.24] * len(summary.by_seed)
            axes.plot(summary.by_seed, seeds, "|", color=look.colour(summary.name), markersize=5)
    axes.axvline(comparison.of(SFT).headline.value, color=look.colour(SFT), linewidth=1, linestyle=":")
    if not comparison.graded:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_xlim(left=min(0.0, *axes.get_xlim()) if axes.get_xlim()[0] < 0.15 else None)
    axes.set_xlabel(f"{comparison.question.measure}, {100 * comparison.question.resampling.confidence:.4g} % interval")
    return drawn


def differences(comparison: Comparison, look: Look) -> Figure:
    """Plot the differences that involve SFT or the best model; filled marks are significant after Holm's correction."""
    shown = {SFT, ranked(comparison)[0].name}
    pairs = [pair for pair in comparison.pairs if {pair.a, pair.b} & shown]
    drawn, (axes,) = figure(WIDTH, 1.1 + 0.42 * len(pairs))
    rows = [(f"{pair.a} − {pair.b}", pair.test.difference) for pair in pairs]
    _forest(axes, rows, look, [pair.a for pair in pairs], [pair.significant for pair in pairs])
    axes.axvline(0, color=look.ink, linewidth=1)
    scale, unit = (1, "") if comparison.graded else (100, ", points")
    axes.xaxis.set_major_formatter(lambda x, _: f"{scale * x:+.3g}" if x else "0")
    axes.set_xlabel(f"difference in {comparison.question.measure}{unit}")
    return drawn


def against_tokens(comparison: Comparison, look: Look) -> Figure:
    """Plot the headline measure with its interval against the tokens that one run sampled and trained on."""
    points = [(c.name, c.tokens, comparison.of(c.name).headline) for c in comparison.costs if c.name in look.algorithms]
    return against_cost(points, "tokens sampled and trained on, one run", comparison.question.measure, look)


def against_cost(points: Sequence[tuple[str, float, Interval]], cost: str, measure: str, look: Look) -> Figure:
    """Plot levels with their intervals against a cost on a logarithmic axis. A point is (algorithm, cost, level)."""
    drawn, (axes,) = figure(WIDTH, 3.4)
    for name, spent, level in points:
        axes.errorbar(
            spent, level.value, yerr=_bars([level]), color=look.colour(name),
            marker=look.marker(name), linestyle="none", elinewidth=1.4, capsize=3, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(cost)
    axes.set_ylabel(measure)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    legend_below(drawn)
    return drawn


def rewards(comparison: Comparison, look: Look) -> Figure:
    """Plot the mean of every reward source over sampled answers, except that of the accuracy."""
    sources, summaries = other_rewards(comparison), comparison.summaries
    drawn, panels = figure(WIDTH, 0.4 + (0.75 + 0.36 * len(summaries)) * len(sources), len(sources))
    for axes, source in zip(panels, sources, strict=True):
        rows = [(s.name, s.rewards[source]) for s in summaries]
        _forest(axes, rows, look)
        axes.set_title(source)
    panels[-1].set_xlabel(
        f"mean reward of sampled answers, {100 * comparison.question.resampling.confidence:.4g} % interval"
    )
    return drawn


def other_rewards(comparison: Comparison) -> list[str]:
    """Return the reward sources whose means are no measure of accuracy."""
    return [name for name in comparison.question.rewards if name != comparison.question.accuracy]


def pass_at_k(comparison: Comparison, look: Look) -> Figure:
    """Plot pass@k against k."""
    drawn, (axes,) = figure(WIDTH, 3.4)
    for summary in comparison.summaries:
        points = [(k, value) for k, value in sorted(summary.pass_at.items()) if value is not None]
        xs, ys = [k for k, _ in points], [value.value for _, value in points]
        axes.errorbar(
            xs, ys, yerr=_bars([value for _, value in points]), color=look.colour(summary.name), marker=look.marker(summary.name),
            label=summary.name, linewidth=1.6, elinewidth=1, capsize=2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(comparison.question.pass_k, [str(k) for k in comparison.question.pass_k])
    axes.minorticks_off()
    axes.set_xlabel("k (sampled answers per prompt)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    legend_below(drawn)
    return drawn


def profiles(comparison: Comparison, look: Look) -> Figure:
    """Plot the share of each algorithm's runs whose headline exceeds a level (performance profiles, 2108.13264)."""
    drawn, (axes,) = figure(WIDTH, 3.2)
    values = [value for summary in comparison.algorithms for value in summary.by_seed]
    margin = max(0.02, 0.1 * (max(values) - min(values)))
    levels = np.linspace(min(values) - margin, max(values) + margin, LEVELS)
    for summary in comparison.algorithms:
        shares, name = performance_profile(summary.by_seed, levels), summary.name
        axes.step(
            levels,
            shares,
            where="post",
            color=look.colour(name),
            linestyle=look.dashes(name),
            linewidth=1.8,
            label=name,
        )
    axes.set_xlabel(comparison.question.measure)
    axes.set_ylabel("share of runs above")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    legend_below(drawn)
    return drawn


def _bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Return the lengths of the bars below and above each value; 0 without an interval."""
    below = [v.value - v.low if v.known else 0.0 for v in intervals]
    return [below, [v.high - v.value if v.known else 0.0 for v in intervals]]


def _forest(
    axes: Axes,
    rows: Sequence[tuple[str, Interval | None]],
    look: Look,
    names: Sequence[str] | None = None,
    filled: Sequence[bool] | None = None,
) -> None:
    """Draw rows from top to bottom; a row without a value keeps its label and stays empty."""
    for row, (label, interval) in enumerate(rows):
        if interval is None:
            continue
        name = names[row] if names else label
        colour, solid = look.colour(name), filled is None or filled[row]
        axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.4, alpha=0.75)
        marker = "o" if names or name not in look.algorithms else look.marker(name)
        axes.plot(
            interval.value, row, marker, color=colour, markersize=7.5, markeredgewidth=1.8,
            markerfacecolor=colour if solid else look.ground,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
