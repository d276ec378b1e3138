"""Read report/comparison.json, also one of an earlier version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.runtime.measures import headline_name
from posttrain.files import read_json

COMPARISON = Path("report") / "comparison.json"
RESTORE_REPORT = "Type `dvc checkout --force report`, or `dvc repro compare`."


def read_comparison(project: Path) -> Any:
    """Return the numbers of the report. Raises DataError if the file is damaged."""
    return with_names(read_json(project / COMPARISON, RESTORE_REPORT))


def with_names(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a report with the headline measure under its name; earlier reports called it `headline`.

    Example:
        >>> with_names({"headline": "sampled", "models": {"sft": {"headline": {"mean": 0.5}, "headline_by_seed": [0.5]}}})["models"]
        {'sft': {'sampled_accuracy': {'mean': 0.5}, 'sampled_accuracy_by_seed': [0.5]}}
    """
    if numbers.get("headline") not in ("sampled", "greedy"):
        return numbers
    name = headline_name(numbers["headline"])
    names = {"headline": name, "headline_by_seed": f"{name}_by_seed"}
    models = {
        model: {names.get(key, key): value for key, value in row.items()} for model, row in numbers["models"].items()
    }
    return numbers | {"headline": name, "models": models}
