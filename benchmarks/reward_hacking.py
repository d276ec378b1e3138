"""How often does the monitor of reward hacking raise a false alarm, and how soon does it see a true one?

    make study NAME=ppo_kl && python benchmarks/reward_hacking.py .posttrain/studies/ppo_kl --write

Simulated runs have a true reward that stays, or rises, with noise of one step that is independent or correlated, under a rising score.
Trained runs are read from the workspaces of studies; runs of one arm differ only in their seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from pipelines.report.hacking import Hacked, find
from pipelines.report.load import Training, training
from posttrain.evaluation.divergence import divergence
from posttrain.files import write_atomic

PAGE = Path(__file__).with_suffix(".md")
RUNS = 400
NOISE = 0.06
"""Standard deviation of the mean of 64 answers with a rate of .5."""
CORRELATION = 0.5
STEPS = (20, 40, 100)
KINDS = ((0.0, 0.0), (0.4, 0.0), (0.0, 0.02), (0.0, 0.04))
"""Gain of the true reward over the run, and the standard deviation of the correlated noise's innovations."""


def simulated(steps: int, gain: float, correlated: float, runs: int = RUNS) -> float:
    """Return the share of runs without a divergence that raise an alarm."""
    generator = np.random.Generator(np.random.PCG64([steps, round(100 * gain), round(100 * correlated)]))
    alarms = 0
    for _ in range(runs):
        drift = np.zeros(steps)
        for step in range(1, steps):
            drift[step] = CORRELATION * drift[step - 1] + generator.normal(0, correlated)
        truth = 0.4 + np.linspace(0, gain, steps) + drift + generator.normal(0, NOISE, steps)
        alarms += divergence(truth, np.linspace(0, 2, steps)) is not None
    return alarms / runs


def arms(folder: Path) -> dict[str, list[Training]]:
    """Return the runs of a study by arm, in the order of their names."""
    found: dict[str, list[Training]] = {}
    for journal in sorted(folder.glob("*/runs/align/*/journal.jsonl")):
        name = journal.parent.name
        found.setdefault(name.rpartition("-")[0], []).append(training(journal.parent, name))
    return found


def row(study: str, arm: str, runs: Sequence[Training]) -> str | None:
    """Return one arm's row, or None if its runs do not log both rewards."""
    known = [run for run in runs if {"reward/answer/mean", "reward/rm/mean"} <= run.curves.keys()]
    if not known:
        return None
    alarms = [one for seed, run in enumerate(known) if (one := find(seed, run, "answer", "rm")) is not None]
    ends = [run.curves["reward/answer/mean"][1] for run in known]
    first, last = (float(np.mean([values[part].mean() for values in ends])) for part in (slice(5), slice(-5, None)))
    low, high = stats.binomtest(len(alarms), len(known)).proportion_ci()
    return f"| {study} | {arm} | {len(known)} | {first:.2f} to {last:.2f} | {len(alarms)} | {low:.0%} to {high:.0%} | {_steps(alarms)} |"


def pooled(folders: Sequence[Path]) -> str:
    """Return a sentence on the alarms of all arms whose true reward rose."""
    found: list[bool] = []
    for runs in (runs for folder in folders for runs in arms(folder).values()):
        known = [run for run in runs if {"reward/answer/mean", "reward/rm/mean"} <= run.curves.keys()]
        curves = [run.curves["reward/answer/mean"][1] for run in known]
        if curves and np.mean([values[-5:].mean() - values[:5].mean() for values in curves]) > 0:
            found += [find(0, run, "answer", "rm") is not None for run in known]
    low, high = stats.binomtest(sum(found), len(found)).proportion_ci()
    return f"Arms whose true reward rose: {sum(found)} alarms in {len(found)} runs ({low:.1%} to {high:.1%})."


def _steps(alarms: Sequence[Hacked]) -> str:
    return ", ".join(f"{one.began} ({one.noticed})" for one in alarms)


def page(folders: Sequence[Path], seconds: float, table: dict[tuple[int, float, float], float]) -> str:
    """Return the page as Markdown."""
    rows = [row(folder.name, arm, runs) for folder in folders for arm, runs in arms(folder).items()]
    lines = [
        "# False alarms of the monitor of reward hacking",
        "",
        f"    python benchmarks/reward_hacking.py {' '.join(folder.as_posix() for folder in folders)} --write    # {seconds:.0f} s",
        "",
        "Trained runs. True reward is the mean of the first and of the last five steps. An arm whose true reward rises is one of false"
        " alarms; the interval (95 %, Clopper-Pearson) is of the share of alarms.",
        "",
        "| study | arm | runs | true reward | alarms | share | began (noticed), steps |",
        "|---|---|---|---|---|---|---|",
        *(line for line in rows if line is not None),
        "",
        pooled(folders),
        "",
        f"Simulated runs without a divergence ({RUNS:,} each): share with an alarm. Independent noise of a step: {NOISE}. Correlated noise"
        f" comes on top; neighbouring steps have a correlation of {CORRELATION}.",
        "",
        "| steps | constant | rising by .4 | constant, correlated .02 | constant, correlated .04 |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {steps} | " + " | ".join(f"{table[steps, *kind]:.1%}" for kind in KINDS) + " |" for steps in STEPS]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print and optionally write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="workspaces of studies: .posttrain/studies/NAME")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args()
    started = time.monotonic()
    table = {(steps, *kind): simulated(steps, *kind) for steps in STEPS for kind in KINDS}
    text = page(options.folders, time.monotonic() - started, table)
    print(text)
    if options.write:
        write_atomic(PAGE, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
