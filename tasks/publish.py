"""Publish the report as Prefect artifacts: its summary table, and a link to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from pipelines.runtime.comparison import COMPARISON, read_comparison


def publish_report(root: Path) -> Path | None:
    """Publish report/comparison.json and report/index.html if they exist; return the page's path."""
    page = root / "report" / "index.html"
    if (root / COMPARISON).is_file():
        table = markdown_table(read_comparison(root))
        create_markdown_artifact(key="comparison", markdown=table, description="Every model of the comparison")
    if not page.is_file():
        return None
    create_link_artifact(
        key="report", link=page.absolute().as_uri(), link_text="Report", description="report/index.html"
    )
    return page


def markdown_table(comparison: Any) -> str:
    """Return one row per model with its scalar entries as columns; a mean with bounds is written `0.512 (0.48 to 0.54)`."""
    models = comparison.get("models", comparison) if isinstance(comparison, dict) else comparison
    named = (
        [{"model": name, **row} for name, row in models.items() if isinstance(row, dict)]
        if isinstance(models, dict)
        else models
    )
    rows = [row for row in named if isinstance(row, dict)]
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if _cell(value) is not None))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) or "" for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str | None:
    """Return a cell's text, or None if the value is not a scalar."""
    if isinstance(value, dict) and all(isinstance(value.get(part), int | float) for part in ("mean", "low", "high")):
        return f"{value['mean']:.3g} ({value['low']:.3g} to {value['high']:.3g})"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value) if isinstance(value, str | int) else None
