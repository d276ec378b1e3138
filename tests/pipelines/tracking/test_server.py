"""MLflow's server begins with the training runs, and gives their metrics in the order of the charts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

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


def test_metrics_of_a_run_are_in_the_order_of_the_charts() -> None:
    names = [
        "seconds/data",
        "loss",
        "cost/seconds",
        "eval/greedy_accuracy",
        "reward/total/mean",
        "eval/sampled_accuracy",
    ]
    answer = {
        "runs": [{"info": {}, "data": {"metrics": [{"key": name, "value": 1.0} for name in names]}}, {"data": {}}]
    }
    found = in_chart_order(answer, "eval/sampled_accuracy")["runs"][0]["data"]["metrics"]
    assert [metric["key"] for metric in found] == [
        "eval/sampled_accuracy", "eval/greedy_accuracy", "reward/total/mean", "loss", "cost/seconds", "seconds/data",
    ]  # fmt: skip
    assert in_chart_order({}, "") == {}
