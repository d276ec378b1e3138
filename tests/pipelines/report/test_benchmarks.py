"""Benchmarks in the report: intervals over documents, changes from base, and models that were asked other documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from pipelines.report.analysis import compare
from pipelines.report.benchmarks import BenchmarkRow, benchmark_rows
from pipelines.report.load import BENCHMARKS, Model, Results, load
from pipelines.report.write import write
from pipelines.runtime.publish import nested
from pipelines.training.benchmark_table import write_scores
from posttrain.errors import DataError
from posttrain.evaluation.benchmarks import BenchmarkScore
from posttrain.evaluation.statistics import Resampling, wilson
from tests.pipelines.synthetic_runs import build

DRAWS = Resampling(1000, 0.95, 0)


def results(**documents: list[list[float]]) -> Results:
    """Return results of models with values by seed and document."""
    models = []
    for group, seeds in documents.items():
        for seed, values in enumerate(seeds):
            mean = sum(values) / len(values) if values else 9.0
            row = {"value": mean, "low": mean - 1, "high": mean + 1, "documents": values}
            none = cast(Any, None)
            models.append(Model(f"{group}-{seed}", group, seed, none, {}, None, {("mine", "acc"): row}))
    return Results(models, cast(Any, None), cast(Any, None), list(documents)[2:], [0])


def only(found: list[BenchmarkRow]) -> BenchmarkRow:
    (row,) = found
    return row


def test_scores_have_intervals_and_their_paired_change_from_base() -> None:
    base, sft, grpo = [1, 1, 1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0]
    row = only(benchmark_rows(results(base=[base], sft=[sft], grpo=[grpo]), DRAWS))
    assert (row.values["base"].low, row.values["base"].high) == pytest.approx(wilson(5, 8))
    assert {name: change.value for name, change in row.changes.items()} == {"sft": -0.125, "grpo": -0.5}
    # 4 losses of 8 and no gain: the exact p is 2 / 16, so the interval reaches 0
    assert 0 < row.changes["grpo"].high < 0.01


def test_seeds_are_averaged_within_a_document() -> None:
    row = only(
        benchmark_rows(results(base=[[1, 0, 1, 0]], sft=[[1, 0, 1, 0]], grpo=[[1, 1, 1, 0], [1, 0, 0, 0]]), DRAWS)
    )
    assert row.values["grpo"].value == pytest.approx(0.5)
    assert row.changes["grpo"].value == pytest.approx(0.0)


def test_a_metric_that_is_no_mean_has_no_change() -> None:
    row = only(benchmark_rows(results(base=[[]], sft=[[]], grpo=[[], []]), DRAWS))
    assert (row.values["grpo"].value, row.values["grpo"].low, row.changes) == (9.0, 8.0, {})


def test_models_with_other_documents_are_refused() -> None:
    with pytest.raises(DataError, match="ran different benchmarks, or the same on different documents"):
        benchmark_rows(results(base=[[1, 0]], sft=[[1, 0, 0]], grpo=[[1, 0]]), DRAWS)


def test_the_page_and_a_table_show_them(tmp_path: Path, root: Path) -> None:
    from pipelines.compare import question_of
    from pipelines.config.params import load_params

    build(tmp_path, prompts=20, samples=1, steps=4, attack=False)
    for number, name in enumerate(("base", "sft", "dpo-0", "grpo-0", "ppo-0")):
        own = tuple(float(i % 5 < number) for i in range(40))
        scores = [BenchmarkScore("mine", "acc", sum(own) / 40, own), BenchmarkScore("text", "ppl", 9.0, (), 0.5)]
        path = tmp_path / "runs" / "evaluate" / name / "artifacts" / BENCHMARKS
        metrics = write_scores(path, scores, DRAWS)
        assert metrics["benchmark/mine/acc/value"] == pytest.approx(number / 5)
        assert metrics["benchmark/text/ppl/high"] == pytest.approx(9.98, abs=1e-3)
        assert pq.read_table(path).num_rows == 2
        assert nested(metrics)["benchmark"]["mine"]["acc"].keys() == {"value", "low", "high"}
    loaded = load(["dpo", "grpo", "ppo"], [0], tmp_path)
    question = question_of(load_params(root / "params.yaml"))
    write(tmp_path / "report", loaded, compare(loaded, question), 2, 0)
    lines = (tmp_path / "report" / "benchmarks.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("task,metric,model,value")
    assert len(lines) == 11
    grpo = dict(
        zip(lines[0].split(","), next(x for x in lines if x.startswith("mine,acc,grpo,")).split(","), strict=True)
    )
    assert (float(grpo["value"]), float(grpo["change"]), grpo["documents"]) == (0.6, 0.6, "40")
    shown = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert 'id="benchmarks"' in shown
    assert "+0.600" in shown
