"""Draw the true reward along training against the seconds that runs took on this machine, for .posttrain/report.html only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipelines.report.curves import Curve, running_mean, seed_mean
from pipelines.report.load import training
from pipelines.report.measured import RunMeasures
from pipelines.report.page import Picture, draw
from pipelines.report.style import Look, figure, legend_below

STEP = "seconds/step"


def curves(
    project: Path, runs: Sequence[RunMeasures], seeds: Mapping[str, Sequence[int]], accuracy: str
) -> dict[str, Curve]:
    """Return (seconds, running mean of the true reward) of each algorithm, means over its seeds.

    Left out are algorithms that do not sample, and those of which a run was interrupted or restored: its steps were not all timed here.
    """
    timed = {run.name: run.values.get(STEP, []) for run in runs}
    found = {}
    for name, own in seeds.items():
        pairs = [_run(project, f"{name}-{seed}", timed, accuracy) for seed in own]
        known = [pair for pair in pairs if pair is not None]
        if known and len(known) == len(pairs):
            (_, x), (_, y) = seed_mean([pair[0] for pair in known]), seed_mean([pair[1] for pair in known])
            found[name] = (x, running_mean(y))
    return found


def _run(project: Path, name: str, timed: Mapping[str, Sequence[float]], accuracy: str) -> tuple[Curve, Curve] | None:
    """Return the curves (step, seconds so far) and (step, true reward) of one run, or None."""
    folder, seconds = project / "runs" / "align" / name, timed.get(f"align-{name}", [])
    if not seconds or not folder.is_dir():
        return None
    reward = training(folder, name).curves.get(f"reward/{accuracy}/mean")
    if reward is None or len(reward[0]) != len(seconds):
        return None
    return (reward[0], np.cumsum(seconds)), reward


def picture(found: Mapping[str, Curve], algorithms: Sequence[str], accuracy: str) -> Picture | None:
    """Return the plot in both colour schemes, or None without curves."""
    if not found:
        return None

    def plot(look: Look) -> Figure:
        drawn, (axes,) = figure(6.0, 3.2)
        for name, (seconds, level) in found.items():
            axes.plot(seconds, level, color=look.colour(name), linestyle=look.dashes(name), linewidth=1.8, label=name)
        axes.set_xlabel("seconds of training steps of one run, on this machine")
        axes.set_ylabel(f"true reward ({accuracy})")
        legend_below(drawn)
        return drawn

    return draw(
        "against_seconds",
        "True reward against wall time",
        "True reward along training against seconds.",
        tuple(algorithms),
        plot,
    )
