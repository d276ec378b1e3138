"""Benchmarks of lm-eval in the report: every model's score with its interval, and its change from the base model (forgetting)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.report.load import BASE, Model, Results
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Floats, Interval, Resampling, floats, mean_interval, paired

HEADER = ("task", "metric", "model", "value", "low", "high", "documents", "change", "change_low", "change_high")


@dataclass(frozen=True)
class BenchmarkRow:
    """One metric of one task.

    Attributes:
        values: by model, over documents. With several seeds each document counts with its mean.
        changes: by model other than base, the paired difference to base; empty if the metric is no mean over documents.
    """

    task: str
    metric: str
    values: dict[str, Interval]
    changes: dict[str, Interval]


def benchmark_rows(results: Results, resampling: Resampling) -> list[BenchmarkRow]:
    """Return one row for each metric of each task that every model has; none if the evaluation ran no benchmark.

    Raises:
        DataError: the models have different tasks or documents.
    """
    first = results.models[0].benchmarks
    for model in results.models[1:]:
        theirs, ours = ({key: len(row["documents"]) for key, row in m.items()} for m in (model.benchmarks, first))
        if theirs != ours:
            raise DataError(
                f"runs/evaluate/{model.name} and runs/evaluate/{results.models[0].name} ran different benchmarks, or the same on different"
                " documents; run `dvc repro` so that all evaluations use the same evaluation.benchmarks"
            )
    return [_row(results, task, metric, resampling) for task, metric in sorted(first)]


def _row(results: Results, task: str, metric: str, resampling: Resampling) -> BenchmarkRow:
    values, changes, tables = {}, {}, {}
    for group in results.groups:
        models = results.of(group)
        tables[group] = _documents(models, (task, metric))
        values[group] = (
            _plain(models, (task, metric))
            if not tables[group].size
            else mean_interval(tables[group] if len(models) > 1 else tables[group][:, 0], resampling)
        )
        if tables[group].size and group != BASE:
            changes[group] = paired(tables[group], tables[BASE], resampling).difference
    return BenchmarkRow(task, metric, values, changes)


def _documents(models: Sequence[Model], key: tuple[str, str]) -> Floats:
    """Return the values [documents, seeds]."""
    return floats([model.benchmarks[key]["documents"] for model in models]).T


def _plain(models: Sequence[Model], key: tuple[str, str]) -> Interval:
    """Return the mean over seeds of a metric that is no mean over documents, with the mean ends of its intervals."""
    value, low, high = (float(np.mean([m.benchmarks[key][name] for m in models])) for name in ("value", "low", "high"))
    return Interval(value, low, high, 0, 0, "normal")


def csv_rows(rows: Sequence[BenchmarkRow]) -> list[list[Any]]:
    """Return one line for each metric and model."""
    lines = []
    for row in rows:
        for model, own in row.values.items():
            change = row.changes.get(model)
            ends = [None] * 3 if change is None else [change.value, change.low, change.high]
            lines.append([row.task, row.metric, model, own.value, own.low, own.high, own.n, *ends])
    return lines
