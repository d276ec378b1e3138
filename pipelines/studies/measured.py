"""Read what the runs of a study took on this machine: seconds and memory of the training.

    measured/seconds             seconds of work of the training, without the imports
    measured/memory_mib          largest resident memory of its process
    measured/seconds_to_level    seconds until the true reward reached the study's `level`, a reward model's training included

These numbers depend on the machine and on what else it does. A claim on them compares runs of one series on one machine. The arms run one
after the other, so a change of the machine's other work counts as a difference of the arms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config.params import parse_params
from pipelines.report.load import PREDICTIONS, predictions, training
from pipelines.report.measured import RunMeasures, all_runs, newest
from pipelines.runtime.publish import ARTIFACTS
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Floats
from posttrain.text import nearest

NAMES = ("seconds", "memory_mib", "seconds_to_level")
WINDOW = 5
"""Steps whose mean true reward must reach the level: one step of few answers reaches it by chance."""


def measured(folder: Path, arm: str, seed: int, name: str, params: Mapping[str, Any], level: float | None) -> float:
    """Return a measurement of the training of one arm and seed in a workspace.

    Raises DataError if the run was restored from a cache, so that this machine has no measurement of it, or never reached the level.
    """
    runs = {run.name: run for run in newest(all_runs(folder))}
    if name == "seconds":
        return _run(runs, f"align-{arm}-{seed}").seconds
    if name == "memory_mib":
        return _memory(_run(runs, f"align-{arm}-{seed}"))
    if name != "seconds_to_level":
        raise DataError(f"measured/{name}: no such measurement{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    if level is None:
        raise DataError("measured/seconds_to_level: the study has no `level`; add it, such as level: 0.45")
    return _seconds_to_level(folder, runs, arm, seed, params, level)


def _seconds_to_level(
    folder: Path, runs: Mapping[str, RunMeasures], arm: str, seed: int, params: Mapping[str, Any], level: float
) -> float:
    """Return the seconds until the mean true reward of WINDOW steps reached the level.

    A run that samples nothing counts with all of its seconds, if its held-out answers reach the level.
    """
    run, place = _run(runs, f"align-{arm}-{seed}"), folder / "runs" / "align" / f"{arm}-{seed}"
    checked = parse_params(dict(params))
    before = _run(runs, "reward").seconds if checked.reward_model_in(arm) else 0.0
    curves = training(place, arm).curves
    accuracy = checked.evaluation.accuracy
    name = f"reward/{accuracy}/mean"
    if name not in curves:
        answers = predictions(folder / "runs" / "evaluate" / f"{arm}-{seed}" / ARTIFACTS / PREDICTIONS)
        held_out = float(np.nanmean(answers.numbers[f"reward_{accuracy}"][:, 1:]))
        if held_out < level:
            raise DataError(
                f"{place}: its held-out answers have {held_out:.3g}, below the study's level {level:g}; choose a lower one"
            )
        return before + run.seconds
    rewards, steps = curves[name][1], run.values.get("seconds/step", [])
    if len(steps) != len(rewards):
        raise DataError(
            f"{place}: {len(rewards)} steps and {len(steps)} measurements of them, because the run was resumed; remove"
            f" {folder}/.posttrain/runs and this run, then train again"
        )
    reached = reaches(rewards, level)
    if reached is None:
        raise DataError(f"{place}: the true reward never reached the study's level {level:g}; choose a lower one")
    return before + run.seconds - sum(steps[reached:])


def reaches(rewards: Floats, level: float) -> int | None:
    """Return the number of steps after which the mean reward of the last WINDOW steps reaches the level for the first time, or None.

    Example:
        >>> reaches(np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]), 0.3), reaches(np.zeros(9), 0.3)
        (6, None)
    """
    if len(rewards) < WINDOW:
        return None
    means = np.convolve(rewards, np.full(WINDOW, 1 / WINDOW), "valid")
    found = np.flatnonzero(means >= level - 1e-12)
    return int(found[0]) + WINDOW if len(found) else None


def _run(runs: Mapping[str, RunMeasures], name: str) -> RunMeasures:
    if name not in runs:
        raise DataError(
            f"{name} has no measurements on this machine: it was restored from DVC's cache. Run the study in a fresh clone,"
            " without a remote, to measure it."
        )
    return runs[name]


def _memory(run: RunMeasures) -> float:
    found = run.greatest("memory/peak_mib")
    if found is None:
        raise DataError(f"{run.name} recorded no memory; it was cut off. Train it again.")
    return found
