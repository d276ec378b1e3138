"""MLflow's server begins with the training runs, and gives their metrics in the order of the charts."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow.server
import pytest

from pipelines.tracking.server import BEGINNINGS, in_chart_order, with_beginnings


@pytest.fixture(scope="module")
def built() -> Path:
    """Return MLflow's built pages."""
    module: ModuleType = mlflow.server
    assert module.__file__ is not None
    return Path(module.__file__).parent / "js" / "build"


def test_the_script_is_before_the_scripts_of_mlflow_and_holds_each_beginning(built: Path) -> None:
    page = with_beginnings((built / "index.html").read_bytes()).decode()
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page)
    written = re.search(r"Object\.entries\((\{.*?\})\)", scripts[0])
    assert written is not None
    assert {name: json.loads(value) for name, value in json.loads(written[1]).items()} == BEGINNINGS
    assert scripts[1] == "", "MLflow's own script is loaded from a file"


def test_the_pages_of_the_pinned_version_read_the_entries(built: Path) -> None:
    main = next((built / "static" / "js").glob("main.*.js")).read_text(encoding="utf-8")
    for name in BEGINNINGS:
        assert f'key:"{name.removesuffix("_v1")}",version:1' in main, name


@pytest.mark.parametrize(
    "about",
    [
        lambda run: {"runs": [run, {"data": {}}]},
        lambda run: {"run": run},
        lambda run: {"data": {"mlflowGetRun": {"apiError": None, "run": run}}, "errors": None},
    ],
    ids=["search", "get", "graphql"],
)
def test_metrics_of_a_run_are_in_the_order_of_the_charts(about: Callable[[Any], dict[str, Any]]) -> None:
    names = [
        "seconds/data",
        "loss",
        "cost/seconds",
        "eval/greedy_accuracy",
        "reward/total/mean",
        "eval/sampled_accuracy",
    ]
    metrics = [{"key": name, "value": 1.0} for name in names]
    in_chart_order(about({"info": {}, "data": {"metrics": metrics}}), "eval/sampled_accuracy")
    assert [metric["key"] for metric in metrics] == [
        "eval/sampled_accuracy", "eval/greedy_accuracy", "reward/total/mean", "loss", "cost/seconds", "seconds/data",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [{}, {"data": None, "errors": ["no"]}, {"data": {"mlflowGetRun": None}}, {"data": {"mlflowGetRun": {"run": None}}}],
)
def test_an_answer_without_metrics_is_left_as_it_is(answer: dict[str, Any]) -> None:
    assert in_chart_order(copy.deepcopy(answer), "") == answer
