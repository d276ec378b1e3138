"""How often does the monitor of reward hacking raise a false alarm, and how soon does it see a true one?

    posttrain configure benchmarks/reward_hacking.yaml && dvc repro align && python benchmarks/reward_hacking.py . --write

Simulated runs have a true reward that stays, rises or falls, with noise of one step that is independent or correlated, under a rising
score. Trained runs are read from workspaces; runs of one algorithm differ only in their seed.
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
FALLS = ((0.5, 0.2), (0.5, 0.35), (0.6, 0.3))
"""True reward before and after half of 40 steps; the last one rises from half of its level before."""
SOON = 10
"""Steps after the fall within which the alarm counts as seen."""


def noise(generator: np.random.Generator, steps: int, correlated: float) -> np.ndarray:
    """Return the noise of each step."""
    drift = np.zeros(steps)
    for step in range(1, steps):
        drift[step] = CORRELATION * drift[step - 1] + generator.normal(0, correlated)
    return drift + generator.normal(0, NOISE, steps)


def simulated(steps: int, gain: float, correlated: float, runs: int = RUNS) -> float:
    """Return the share of runs without a divergence that raise an alarm."""
    generator = np.random.Generator(np.random.PCG64([steps, round(100 * gain), round(100 * correlated)]))
    score = np.linspace(0, 2, steps)
    alarms = 0
    for _ in range(runs):
        truth = 0.4 + np.linspace(0, gain, steps) + noise(generator, steps, correlated)
        alarms += divergence(truth, score) is not None
    return alarms / runs


def seen(before: float, after: float, correlated: float, runs: int = RUNS, steps: int = 40) -> float:
    """Return the share of runs with a fall at half of the steps whose alarm comes at most SOON steps after it, and not before."""
    generator = np.random.Generator(np.random.PCG64([round(100 * before), round(100 * after), round(100 * correlated)]))
    half = steps // 2
    rise = np.linspace(before / 2 if (before, after) == FALLS[-1] else before, before, half)
    clean = np.concatenate([rise, np.full(steps - half, after)])
    found = [divergence(clean + noise(generator, steps, correlated), np.linspace(0, 2, steps)) for _ in range(runs)]
    return float(np.mean([one is not None and half <= one.noticed <= half + SOON for one in found]))


def arms(folder: Path) -> dict[str, list[Training]]:
    """Return the runs of a study by arm, in the order of their names."""
    found: dict[str, list[Training]] = {}
    for journal in sorted([*folder.glob("runs/align/*/journal.jsonl"), *folder.glob("*/runs/align/*/journal.jsonl")]):
        name = journal.parent.name
        found.setdefault(name.rpartition("-")[0], []).append(training(journal.parent, name))
    return found


def row(arm: str, runs: Sequence[Training]) -> str | None:
    """Return one arm's row, or None if its runs do not log both rewards."""
    known = [run for run in runs if {"reward/answer/mean", "reward/rm/mean"} <= run.curves.keys()]
    if not known:
        return None
    alarms = [one for seed, run in enumerate(known) if (one := find(seed, run, "answer", "rm")) is not None]
    ends = [run.curves["reward/answer/mean"][1] for run in known]
    first, last = (float(np.mean([values[part].mean() for values in ends])) for part in (slice(5), slice(-5, None)))
    low, high = stats.binomtest(len(alarms), len(known)).proportion_ci()
    return f"| {arm} | {len(known)} | {first:.2f} to {last:.2f} | {len(alarms)} | {low:.0%} to {high:.0%} | {_steps(alarms)} |"


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
    rows = [row(arm, runs) for folder in folders for arm, runs in arms(folder).items()]
    lines = [
        "# False alarms of the monitor of reward hacking",
        "",
        "    posttrain configure benchmarks/reward_hacking.yaml && dvc repro align",
        f"    python benchmarks/reward_hacking.py {' '.join(folder.as_posix() for folder in folders)} --write    # {seconds:.0f} s",
        "",
        "Trained runs. True reward is the mean of the first and of the last five steps. An algorithm whose true reward rises hacks nothing,"
        " so its alarms are false; the interval (95 %, Clopper-Pearson) is of the share of alarms.",
        "",
        "| algorithm | runs | true reward | alarms | share | began (noticed), steps |",
        "|---|---|---|---|---|---|",
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
    lines += [
        "",
        f"Simulated runs of 40 steps whose true reward falls after 20 ({RUNS:,} each): share whose alarm comes within {SOON} steps.",
        "",
        "| true reward | independent noise | correlated .04 |",
        "|---|---|---|",
        *(f"| {_fall(*fall)} | {seen(*fall, 0.0):.0%} | {seen(*fall, 0.04):.0%} |" for fall in FALLS),
    ]
    return "\n".join(lines) + "\n"


def _fall(before: float, after: float) -> str:
    return (
        f"{before / 2:g} rising to {before:g}, then {after:g}"
        if (before, after) == FALLS[-1]
        else f"{before:g}, then {after:g}"
    )


def main() -> int:
    """Measure, print and optionally write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="*", type=Path, help="workspaces with finished runs: . or .posttrain/studies/NAME"
    )
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
