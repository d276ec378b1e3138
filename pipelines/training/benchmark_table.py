"""Write the scores of benchmarks as a table, and as metrics of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from posttrain.evaluation.benchmarks import BenchmarkScore
    from posttrain.evaluation.statistics import Resampling

BENCHMARKS = "benchmarks.parquet"


def write_scores(path: Path, scores: Sequence[BenchmarkScore], resampling: Resampling) -> dict[str, float]:
    """Write the scores with their documents, and return them as metrics with the ends of their intervals."""
    metrics: dict[str, float] = {}
    intervals = [score.interval(resampling) for score in scores]
    for score, interval in zip(scores, intervals, strict=True):
        name = f"benchmark/{score.task}/{score.metric}"
        metrics |= {f"{name}/value": interval.value}
        metrics |= {f"{name}/low": interval.low, f"{name}/high": interval.high} if interval.known else {}
    columns: dict[str, Any] = {
        "task": [score.task for score in scores],
        "metric": [score.metric for score in scores],
        "value": pa.array([interval.value for interval in intervals], pa.float64()),
        "low": pa.array([interval.low for interval in intervals], pa.float64()),
        "high": pa.array([interval.high for interval in intervals], pa.float64()),
        "documents": pa.array([list(score.by_document) for score in scores], pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(columns), path)
    return metrics
