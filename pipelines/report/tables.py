"""Write the report's numbers as files: comparison.json, accuracy.csv, pairwise.csv, curves.csv, benchmarks.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from pipelines.report.analysis import Comparison, Cost, Pair, Question, Summary
from pipelines.report.benchmarks import HEADER, BenchmarkRow, csv_rows
from pipelines.report.checkpoints import ChosenStep
from pipelines.report.load import Results
from pipelines.report.words import findings, ranked, solved, title
from pipelines.runtime.journal import representable
from pipelines.runtime.measures import GREEDY, SAMPLED, headline_name
from posttrain.evaluation.statistics import Interval

_DIGITS = 10


def comparison_json(comparison: Comparison) -> str:
    """Return all numbers of the page as JSON, for programs."""
    question, best = comparison.question, ranked(comparison)[0]
    tree = {
        "title": title(comparison),
        "findings": findings(comparison),
        "solved": solved(comparison),
        "best": best.name if solved(comparison) else None,
        "headline": headline_name(question.headline),
        "accuracy_source": question.accuracy,
        "confidence": question.resampling.confidence,
        "resamples": question.resampling.resamples,
        "prompts": comparison.prompts,
        "ranked": [summary.name for summary in ranked(comparison)],
        "not_ranked": comparison.apart(),
        "protocols": {name: asdict(protocol) for name, protocol in sorted(comparison.protocols.items())},
        "models": {summary.name: _summary(summary, question) for summary in comparison.summaries},
        "pairs": [_pair(pair) for pair in comparison.pairs],
        "reward_model": {"heldout_accuracy": _interval(comparison.heldout), "heldout_loss": comparison.heldout_loss},
        "reward_hacking": {name: asdict(own) for name, own in sorted(comparison.watched.items())},
        "cost": {cost.name: _cost(cost) for cost in comparison.costs},
    }
    return json.dumps(representable(_rounded(tree)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _summary(summary: Summary, question: Question) -> dict[str, Any]:
    """Return one model's row as JSON: both measures by their names, and the other rewards under `reward`."""
    others = {name: value for name, value in summary.rewards.items() if name != question.accuracy}
    return {
        "seeds": list(summary.seeds),
        **{name: _interval(level) for name, level in summary.measures.items()},
        f"{headline_name(question.headline)}_by_seed": list(summary.by_seed),
        "interquartile_mean": summary.iqm,
        "pass_at_k": {str(k): _interval(value) for k, value in sorted(summary.pass_at.items())},
        "reward": {name: _interval(value) for name, value in sorted(others.items())},
        "win_rate_against_sft": _interval(summary.win_rate),
        "kl_to_sft": _interval(summary.kl),
        "length": _interval(summary.length),
        "truncated": _interval(summary.truncated),
        "answers_not_found": summary.not_found,
        "entropy": _interval(summary.entropy),
        "preference_accuracy": summary.preference,
        "second_task_accuracy": summary.second_task,
    }


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    """Return an interval as JSON; without one, both limits are null, and `method` says why."""
    if interval is None:
        return None
    ends = {} if interval.known else {"low": None, "high": None}
    return {"mean": interval.value} | {key: value for key, value in asdict(interval).items() if key != "value"} | ends


def _pair(pair: Pair) -> dict[str, Any]:
    """Return one test as JSON."""
    return {
        "a": pair.a,
        "b": pair.b,
        "difference": _interval(pair.test.difference),
        "test": pair.test.method,
        "only_a": pair.test.only_a,
        "only_b": pair.test.only_b,
        "p": pair.test.p,
        "p_holm": pair.adjusted,
        "significant": pair.significant,
        "hedges_g": pair.effect,
        "probability_of_improvement": pair.improvement,
    }


def _cost(cost: Cost) -> dict[str, Any]:
    """Return the costs of one row as JSON."""
    return {key: value for key, value in asdict(cost).items() if key != "name"}


def accuracy_csv(comparison: Comparison) -> str:
    """Return one row per model, with both measures of accuracy."""
    columns = [f"{name}{end}" for name in (SAMPLED, GREEDY) for end in ("", "_low", "_high", "_missing", "_method")]
    rows = [
        [s.name, max(1, len(s.seeds)), comparison.prompts]
        + [cell for level in s.measures.values() for cell in (level.value, level.low, level.high, level.missing, level.method)]
        for s in comparison.summaries
    ]  # fmt: skip
    return _csv(["model", "seeds", "prompts", *columns], rows)


def pairwise_csv(comparison: Comparison) -> str:
    """Return one row per test."""
    header = [
        "a",
        "b",
        "difference",
        "low",
        "high",
        "prompts",
        "only_a",
        "only_b",
        "test",
        "p",
        "p_holm",
        "significant",
        "hedges_g",
        "probability_of_improvement",
    ]
    rows = []
    for pair in comparison.pairs:
        test, d = pair.test, pair.test.difference
        rows.append([pair.a, pair.b, d.value, d.low, d.high, d.n, test.only_a, test.only_b, test.method, test.p,
                     pair.adjusted, str(pair.significant).lower(), pair.effect, pair.improvement])  # fmt: skip
    return _csv(header, rows)


def curves_csv(results: Results) -> str:
    """Return the curves in long format: one row per run, metric and step."""
    runs = [("sft", "", results.sft), ("reward", "", results.reward)]
    runs += [(m.group, str(m.seed), m.training) for m in results.models if m.training is not None]
    rows = [
        [name, seed, metric, int(step), value]
        for name, seed, run in runs
        for metric, (steps, values) in run.curves.items()
        for step, value in zip(steps.tolist(), values.tolist(), strict=True)
    ]
    return _csv(["model", "seed", "metric", "step", "value"], rows)


def benchmarks_csv(rows: Sequence[BenchmarkRow]) -> str:
    """Return one row per task, metric and model."""
    return _csv(HEADER, csv_rows(rows))


def checkpoints_csv(rows: Sequence[ChosenStep]) -> str:
    """Return one row per run with the step that is evaluated."""
    header = ["model", "seed", "step", "steps", "measured", "selection", "evaluation"]
    return _csv(header, [list(asdict(row).values()) for row in rows])


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return header and rows as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None or cell != cell else _text(_rounded(cell)) for cell in row] for row in rows])
    return out.getvalue()


def _text(cell: Any) -> Any:
    """Return text that a spreadsheet does not take for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _rounded(tree: Any) -> Any:
    """Round floats to ten significant digits; further digits depend on the order of summation."""
    if isinstance(tree, float) and math.isfinite(tree):
        return float(f"{tree:.{_DIGITS}g}")
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rounded(value) for value in tree]
    return tree
