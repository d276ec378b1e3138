"""Simulate how often the gate promotes an equal model (level) and a better one (power), by the number of evaluation prompts.

    python benchmarks/gate.py [--trials 1000] [--write]

Every prompt has its own chance of a right answer, drawn from Beta(2, 1), and each model gives four answers to it. With `--write` the
table goes to benchmarks/gate.md. tests/pipelines/promotion/test_level.py asserts the level, also for ties and missing rewards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pipelines.promotion.gain import shown
from posttrain.evaluation.statistics import Floats, Resampling

PROMPTS = (1, 2, 3, 5, 8, 20, 30, 50, 100, 200, 400)
GAINS = (0.05, 0.1, 0.2)
LEVEL, ANSWERS = 0.025, 4


def answered(rng: np.random.Generator, chance: Floats) -> Floats:
    """Return the mean reward of each prompt's answers, [trials, prompts]."""
    return rng.binomial(ANSWERS, chance) / ANSWERS


def promoted(prompts: int, gain: float, candidates: int, trials: int) -> float:
    """Return the share of trials in which at least one of the candidates is promoted."""
    rng = np.random.default_rng(prompts)
    chance = rng.beta(2, 1, (trials, prompts))
    champion = answered(rng, chance)
    resampling = Resampling(1000, 1 - 2 * LEVEL / candidates, 7)
    found = np.zeros(trials, dtype=bool)
    for _ in range(candidates):
        found |= shown(answered(rng, np.clip(chance + gain, 0, 1)) - champion, 0.0, 1.0, resampling)
    return float(found.mean())


def table(trials: int) -> str:
    """Return the Markdown table."""
    head = ["prompts", "equal model", "best of 8 equal models", *(f"gain of {gain:g}" for gain in GAINS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for prompts in PROMPTS:
        shares = [promoted(prompts, 0.0, 1, trials), promoted(prompts, 0.0, 8, trials)]
        shares += [promoted(prompts, gain, 1, trials) for gain in GAINS]
        lines.append(f"| {prompts} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/gate.md")
    args = parser.parse_args()
    margin = 1.96 * (LEVEL * (1 - LEVEL) / args.trials) ** 0.5
    text = (
        f"# Level and power of the gate\n\n`python benchmarks/gate.py --trials {args.trials} --write`: how often a model is promoted, with"
        f" {ANSWERS} answers a prompt. The nominal level is {LEVEL:.1%}, give or take {margin:.1%} in so many trials; a gain is clipped at"
        " a chance of one. `gate.min_prompts` in params.yaml is the least number of prompts with which the gate promotes at all."
        f"\n\n{table(args.trials)}\n"
    )
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
