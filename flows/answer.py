"""Say the answer of a comparison on the terminal: the title, a table of the models, and whether seeds say more than that."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.report.load import BASE, SFT
from pipelines.runtime.comparison import COMPARISON, read_comparison
from pipelines.runtime.measures import in_words
from posttrain.files import read_json

WIDTH = 100
COSTS = Path(".posttrain") / "costs" / "costs.json"


def answer(root: Path) -> list[str]:
    """Return the answer of report/comparison.json in lines of at most `WIDTH` columns; empty without a report."""
    costs = root / COSTS
    if not (root / COMPARISON).is_file():
        return []
    numbers = read_comparison(root)
    measured = read_json(costs, "Remove it; the next flow writes it again.") if costs.is_file() else {}
    scope, *others = numbers["findings"]
    return [
        *textwrap.wrap(f"answer: {numbers['title']}", WIDTH, subsequent_indent="  "),
        "",
        *table(numbers, seconds(list(numbers["models"]), measured.get("runs", ()))),
        "",
        *textwrap.wrap(scope if numbers["solved"] else " ".join([scope, *others[:1]]), WIDTH),
    ]


def seconds(models: Sequence[str], runs: Sequence[Any]) -> dict[str, float]:
    """Return the seconds that one training run of each model took here, as the mean over its seeds. `runs`: rows of costs.json.

    Example:
        >>> seconds(["sft", "dpo"], [{"name": f"align-dpo-{seed}", "seconds": 40.0 + seed} for seed in (0, 1)])
        {'dpo': 40.5}
    """
    found: dict[str, list[float]] = {}
    for run in runs:
        name = (
            run["name"].removeprefix("align-").rpartition("-")[0] if run["name"].startswith("align-") else run["name"]
        )
        found.setdefault(name, []).append(run["seconds"])
    return {name: sum(found[name]) / len(found[name]) for name in models if name in found}


def table(numbers: Any, spent: Mapping[str, float]) -> list[str]:
    """Return one line a model: the ranked algorithms, the others with the reason, and the models that training started from."""
    models, apart = numbers["models"], numbers.get("not_ranked", {})
    names = [*numbers["ranked"], *apart, *(name for name in (SFT, BASE) if name in models)]
    first, measure = max(9, *map(len, names)), in_words(numbers["headline"])
    interval = f"{100 * numbers['confidence']:.4g} % interval"
    lines = [f"  {'model':<{first}}  {measure}  {interval:>14}  seconds"]
    for name in names:
        level = models[name][numbers["headline"]]
        share, ends = f"{100 * level['mean']:.1f} %", f"{100 * level['low']:.1f} to {100 * level['high']:.1f}"
        time = f"{spent[name]:.0f}" if name in spent else "-"
        row = f"  {name:<{first}}  {share:>{len(measure)}}  {ends:>14}  {time:>7}"
        reason = [f"not ranked: {', '.join(apart[name])}"] if name in apart else []
        lines += textwrap.wrap(
            "".join(reason), WIDTH, initial_indent=row + "  ", subsequent_indent=" " * (first + 4)
        ) or [row]
    return lines
