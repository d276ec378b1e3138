"""Add training seeds to params.yaml, so that a comparison grows without training anything again.

Runs are stages of DVC, one for each algorithm and seed: those of earlier seeds stay as they are.

Example:
    >>> more([0, 3], 4), more([0, 1], 2)
    ([0, 3, 1, 2], [0, 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.commands.configure import configure
from pipelines.config.params import load_params
from pipelines.runtime.comparison import COMPARISON


def more(seeds: Sequence[int], count: int) -> list[int]:
    """Return `seeds`, followed by the smallest other numbers until there are `count`."""
    unused = (seed for seed in range(count + len(seeds)) if seed not in seeds)
    return [*seeds, *(next(unused) for _ in range(count - len(seeds)))]


def raise_seeds(root: Path, count: int) -> list[str]:
    """Change `project.seeds` of params.yaml to `count` seeds and return the lines to print.

    Seeds are only added. A comparison that was read before is read again, so the lines say how many looks its level allows.
    """
    path = root / "params.yaml"
    params = load_params(path)
    before = params.project.seeds
    if len(before) >= count:
        return [f"seeds: params.yaml has {len(before)} of them, {list(before)}; none is added"]
    after = more(before, count)
    configure(path, [f"project.seeds={after}"])
    lines = [f"seeds: {after[len(before) :]} are added to params.yaml; runs of {list(before)} stay as they are"]
    if not (root / COMPARISON).exists():
        return lines
    looks, level = params.report.looks, params.report.level(count)
    if looks == 1:
        return [
            *lines,
            f"looks: this comparison was read before. With report.looks = 1 its {level:.0%} intervals hold for one look only: stopping at"
            " the first difference finds differences that are not there. Set report.looks to the looks that you mean to take in all, or to"
            " always.",
        ]
    if looks == "always":
        return [
            *lines,
            f"looks: report.looks = always, so {count} seeds have intervals of {level:.4%}, and those of all numbers of seeds together keep"
            " the level",
        ]
    return [
        *lines,
        f"looks: report.looks = {looks}, so each look has intervals of {level:.2%}, and all of them together keep the level",
    ]
