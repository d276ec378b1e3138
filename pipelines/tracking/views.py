"""Describe the experiment for MLflow's pages: a text that links to the runs, and a saved view that compares the algorithms.

The saved view is a tag that MLflow's page reads: columns, grouping, and the order of the charts. Without it MLflow sorts charts by name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.runtime.measures import in_words
from pipelines.runtime.ranking import RANKED
from pipelines.tracking import describe
from pipelines.tracking.source import COST, RESULT, START, RecordedRun

KEY = "algorithms"
VIEW_TAG, NOTE_TAG = f"mlflow.sharedViewState.{KEY}", "mlflow.note.content"
KIND = {"mlflow.experimentKind": "custom_model_development"}
TRAINING_PAGES = "workflowType=machine_learning"
"""MLflow's own server opens an experiment on its pages for agents, unless the address asks for the pages of training runs."""
FILTER = "tags.stage = 'align'"
SECTIONS = (
    ("Result on held-out problems", (RANKED, RESULT)),
    ("Reward", ("reward/",)),
    ("Accuracy on pairs", ("preference/accuracy", "heldout/")),
    ("KL", ("kl/",)),
    ("Entropy", ("entropy",)),
    ("Length", ("length/",)),
    ("Loss", ("loss",)),
    ("Cost", (COST, "tokens/")),
)
"""Title of each section of charts, and the prefixes of its metrics, in the order of the page."""
REST = "More"
_TITLES = [*(title for title, _ in SECTIONS), REST]
LEARNING_RATE = "optimizer.learning_rate"
BOUNDS = ("_low", "_high")
"""Ends of the names of interval bounds, which are columns of the table but have no charts."""
FIRST = (
    "eval/sampled_accuracy",
    "eval/greedy_accuracy",
    "eval/kl_ref_k1",
    "eval/length",
    "reward/total/mean",
    "kl/ref_k1",
    "preference/accuracy",
)
"""Metrics that come first in their section."""
COLUMNS = (
    "tags.`ranked`",
    "metrics.`eval/greedy_accuracy`",
    "metrics.`eval/kl_ref_k1`",
    "metrics.`cost/seconds`",
    f"params.`{LEARNING_RATE}`",
)
"""Columns of the table next to the headline; MLflow sorts them by name, and a window of usual width shows seven.

Algorithm and seed are in the names of the runs."""


def runs_page(experiment: str) -> str:
    """Return the part of the address after the host that opens the compared runs in the saved view."""
    return f"/#/experiments/{experiment}/runs?{TRAINING_PAGES}&viewStateShareKey={KEY}"


def experiment_tags(experiment: str, sources: Sequence[RecordedRun], headline: str) -> dict[str, str]:
    """Return the tags of an experiment for the runs of this checkout; empty before an algorithm has run.

    `headline` is the measure of all runs; the runs are sorted by that of the ranked ones, as soon as a comparison has ranked some.
    """
    aligned = [source for source in sources if source.start["stage"] == "align"]
    if not aligned:
        return {}
    metrics = sorted({describe.entity_name(name) for source in aligned for name, _ in source.metrics | source.timings})
    ranked = sorted({name for source in aligned for name in describe.ranked_values(source)})
    metrics = ranked + [name for name in metrics if not name.startswith(describe.SYSTEM)]  # on the pages of runs
    state = {
        "searchFilter": FILTER,
        "orderByKey": f"metrics.`{next((n for n in ranked if n.endswith(headline.removeprefix(RESULT))), headline)}`",
        "orderByAsc": False,
        "selectedColumns": list(dict.fromkeys([f"metrics.`{headline}`", *COLUMNS])),
        "runsHiddenMode": "SHOW_ALL",
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "groupBy": _grouping(aligned),
        **_charts(metrics, _axes(aligned), headline),
    }
    view = {"name": "Compare algorithms", "createdAt": 0, "updatedAt": 0, "state": _compressed(json.dumps(state))}
    return {VIEW_TAG: json.dumps(view), NOTE_TAG: note(experiment, aligned), **KIND}


def _compressed(text: str) -> str:
    """Return the text in the form that MLflow's page inflates: a tag holds at most 20,000 characters."""
    return "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def note(experiment: str, aligned: Sequence[RecordedRun]) -> str:
    """Return the description of the experiment: where the runs are, and the result of each."""
    return (
        f"{len(aligned)} align runs. [**Compare the algorithms**](.{runs_page(experiment)}): their curves, results, costs and"
        f" hyper-parameters.\n\n[All runs](./#/experiments/{experiment}/runs?{TRAINING_PAGES}) · the report with intervals and tests is"
        " `report/index.html`.\n"
    )


def varied(aligned: Iterable[RecordedRun]) -> list[str]:
    """Return the hyper-parameters whose values differ between runs of one algorithm; none if no algorithm was swept."""
    by_name: dict[str, dict[str, set[str]]] = {}
    for source in aligned:
        for name, value in describe.parameters(source).items():
            by_name.setdefault(name, {}).setdefault(str(source.start["arguments"].get("algorithm")), set()).add(value)
    swept = [name for name, groups in by_name.items() if any(len(values) > 1 for values in groups.values())]
    return sorted(swept)


def _grouping(aligned: Sequence[RecordedRun]) -> dict[str, Any] | None:
    """Return a grouping that puts several runs together, None if there is none: MLflow draws their mean with a band.

    It is by algorithm, swept hyper-parameters, and the supervised model if there were several: a mean over these would say nothing.
    """
    swept, starts = varied(aligned), {source.start.get("inputs", {}).get(START) for source in aligned}
    groups = [
        (
            str(source.start["arguments"].get("algorithm")),
            source.start.get("inputs", {}).get(START),
            *map(describe.parameters(source).get, swept),
        )
        for source in aligned
    ]
    if len(groups) == len(set(groups)):
        return None
    keys = [("tag", "algorithm"), *([("tag", "protocol")] if len(starts) > 1 else [])]
    keys += [("param", name) for name in swept]
    return {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": mode, "groupByData": name} for mode, name in keys],
    }


def _axes(aligned: Sequence[RecordedRun]) -> list[str]:
    """Return the hyper-parameters of the parallel coordinates. In groups MLflow draws only those that are numbers."""
    axes = varied(aligned) or [LEARNING_RATE, "preset"]
    if _grouping(aligned) is None:
        return axes
    given = [describe.parameters(source) for source in aligned]
    return [name for name in axes if all(_is_number(each.get(name, "")) for each in given)] or [LEARNING_RATE]


def _is_number(text: str) -> bool:
    """Return True if MLflow's page reads a parameter as a number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _charts(metrics: Sequence[str], hyper_parameters: Sequence[str], headline: str) -> dict[str, list[dict[str, Any]]]:
    """Return the charts and their sections, in the order of the page."""
    ordered = sorted(metrics, key=lambda name: (not name.startswith(RANKED), chart_order(name, headline)))
    used = [title for title in _TITLES if any(_section(name) == title for name in ordered)]
    sections = [
        {
            "uuid": _uuid(title),
            "name": title,
            "display": True,
            "isReordered": True,
            "deleted": False,
            "isGenerated": False,
            "columns": 2,
            "cardHeight": 300,
        }
        for title in used
    ]
    return {
        "compareRunSections": sections,
        "compareRunCharts": [_parallel(hyper_parameters, headline), *map(_chart, ordered)],
    }


def chart_order(name: str, headline: str) -> tuple[int, bool, int, str]:
    """Return the sort key of a metric: its section, the headline first, then its place within the section."""
    return (_TITLES.index(_section(name)), name != headline, FIRST.index(name) if name in FIRST else len(FIRST), name)


def _section(metric: str) -> str:
    """Return the title of the section of a metric."""
    for title, prefixes in SECTIONS:
        if any(metric == prefix or (prefix.endswith("/") and metric.startswith(prefix)) for prefix in prefixes):
            return title
    return REST


def _chart(metric: str) -> dict[str, Any]:
    """Return the chart of one metric: bars for single values, else a line over steps."""
    single = metric.startswith((RANKED, RESULT, COST))
    common = {
        "uuid": _uuid(f"chart {metric}"),
        "type": "BAR" if single else "LINE",
        "runsCountToCompare": 100,
        "metricSectionId": _uuid(_section(metric)),
        "deleted": metric.endswith(BOUNDS),
        "isGenerated": True,
        "displayName": _title(metric),
        "metricKey": metric,
    }
    return common if single else common | _LINE


def _title(metric: str) -> str:
    """Return the title of a metric's chart."""
    if metric.startswith(RANKED):
        return f"{in_words(metric.removeprefix(RANKED)).capitalize()} of the ranked runs"
    return metric.removeprefix(RESULT).removeprefix(COST)


_LINE: dict[str, Any] = {
    "lineSmoothness": 0,
    "xAxisScaleType": "linear",
    "scaleType": "linear",
    "range": {},
    "xAxisKey": "step",
    "selectedXAxisMetricKey": "",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "ignoreOutliers": False,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}


def _parallel(hyper_parameters: Sequence[str], headline: str) -> dict[str, Any]:
    """Return the parallel coordinates of the accuracy against the hyper-parameters that were varied."""
    return {
        "uuid": _uuid("parallel"),
        "type": "PARALLEL",
        "runsCountToCompare": 100,
        "metricSectionId": _uuid(SECTIONS[0][0]),
        "deleted": False,
        "isGenerated": False,
        "displayName": "Accuracy against hyper-parameters",
        "selectedParams": list(hyper_parameters),
        "selectedMetrics": [headline],
        "showAllRuns": False,
    }


def _uuid(name: str) -> str:
    """Return a stable identifier."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
