"""Write the report folder: page, plots and tables. Equal runs give equal bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.report import tables
from pipelines.report.analysis import Comparison
from pipelines.report.benchmarks import benchmark_rows
from pipelines.report.checkpoints import chosen_steps
from pipelines.report.load import Results
from pipelines.report.markdown import comparison_md
from pipelines.report.page import page, pictures


def write(folder: Path, results: Results, comparison: Comparison, samples_shown: int, seed: int) -> None:
    """Replace `folder` by the report."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    drawn = pictures(results, comparison)
    for picture in drawn.values():
        (folder / f"{picture.name}.png").write_bytes(picture.bytes["light"])
    texts = {
        "index.html": page(results, comparison, drawn, samples_shown, seed),
        "comparison.json": tables.comparison_json(comparison),
        "comparison.md": comparison_md(comparison),
        "accuracy.csv": tables.accuracy_csv(comparison),
        "pairwise.csv": tables.pairwise_csv(comparison),
        "curves.csv": tables.curves_csv(results),
    }
    if benchmarks := benchmark_rows(results, comparison.question.resampling):
        texts["benchmarks.csv"] = tables.benchmarks_csv(benchmarks)
    if chosen := chosen_steps(results, comparison.question.accuracy):
        texts["checkpoints.csv"] = tables.checkpoints_csv(chosen)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
