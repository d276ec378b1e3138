"""How often does the monitor of reward hacking raise a false alarm, and how soon does it see a true one?

    make study NAME=ppo_kl && python benchmarks/reward_hacking.py .posttrain/studies/ppo_kl --write

Simulated runs have a true reward that stays, rises or falls, with noise of one step that is independent or correlated, under a rising
score. Trained runs are read from the workspaces of studies; runs of one arm differ only in their seed (A/A). A run that was trained on
the true answer only has no score. It is watched with a score that always rises, which makes no alarm less likely.
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

from pipelines.report.load import Training, training
from posttrain.evaluation.divergence import Divergence, divergence
from posttrain.files import write_atomic

TRUTH, SCORE = "reward/answer/mean", "reward/rm/mean"
PAGE = Path(__file__).with_suffix(".md")
RUNS = 600
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
    for journal in sorted(folder.glob("*/runs/align/*/journal.jsonl")):
        name = journal.parent.name
        found.setdefault(name.rpartition("-")[0], []).append(training(journal.parent, name))
    return {arm: runs for arm, runs in found.items() if all(TRUTH in run.curves for run in runs)}


def alarms_of(runs: Sequence[Training]) -> list[Divergence]:
    """Return the alarms of the runs of one arm."""
    found = []
    for run in runs:
        truth = run.curves[TRUTH][1]
        score = run.curves[SCORE][1] if SCORE in run.curves else np.arange(len(truth))
        found.append(divergence(truth, score))
    return [one for one in found if one is not None]


def ends_of(runs: Sequence[Training]) -> tuple[float, float]:
    """Return the mean true reward of the first and of the last five steps."""
    curves = [run.curves[TRUTH][1] for run in runs]
    return float(np.mean([c[:5].mean() for c in curves])), float(np.mean([c[-5:].mean() for c in curves]))


def row(study: str, arm: str, runs: Sequence[Training]) -> str:
    """Return one arm's row."""
    alarms, (first, last) = alarms_of(runs), ends_of(runs)
    score = "reward model" if SCORE in runs[0].curves else "always rises"
    steps = len(runs[0].curves[TRUTH][1])
    return f"| {study} | {arm} | {len(runs)} | {steps} | {score} | {first:.2f} to {last:.2f} | {len(alarms)} | {_steps(alarms)} |"


def pooled(folders: Sequence[Path]) -> str:
    """Return a sentence on the alarms of all arms whose true reward rose."""
    every = [runs for folder in folders for runs in arms(folder).values()]
    rose = [runs for runs in every if ends_of(runs)[1] > ends_of(runs)[0]]
    count, alarms = sum(map(len, rose)), sum(len(alarms_of(runs)) for runs in rose)
    low, high = stats.binomtest(alarms, count).proportion_ci()
    return f"Arms whose true reward rose: {alarms} alarms in {count} runs (95 % interval, Clopper-Pearson: {low:.1%} to {high:.1%})."


def _steps(alarms: Sequence[Divergence]) -> str:
    return ", ".join(f"{one.began} ({one.noticed})" for one in alarms)


def page(folders: Sequence[Path], seconds: float, table: dict[tuple[int, float, float], float]) -> str:
    """Return the page as Markdown."""
    rows = [row(folder.name, arm, runs) for folder in folders for arm, runs in arms(folder).items()]
    lines = [
        "# False alarms of the monitor of reward hacking",
        "",
        f"    python benchmarks/reward_hacking.py {' '.join(folder.as_posix() for folder in folders)} --write    # {seconds:.0f} s",
        "",
        "Trained runs of the studies in docs/claims.md; runs of one arm differ only in their seed. True reward is the mean of the first and"
        " of the last five steps. An arm whose true reward rises hacks nothing, so its alarms are false. Arms that were trained on the true"
        " answer only are watched with a score that always rises, which makes no alarm less likely. The level and the blocks of the rule"
        " were chosen with these runs in view.",
        "",
        "| study | arm | runs | steps | score | true reward | alarms | began (noticed), steps |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
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
