"""Write the page of machine costs: wall time, share of orchestration, memory and throughput of the runs on this machine.

    python -m pipelines.report.costs

Writes .posttrain/costs/index.html and costs.json, and .posttrain/report.html, which is the report with these times in it, and with the
preferences of people. Neither is part of report/ or of any result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.labelling.win_rates import win_rates
from pipelines.report.forest import against_cost
from pipelines.report.load import BASE, SFT
from pipelines.report.measured import FlowTime, RunMeasures, all_runs, flow_time, newest
from pipelines.report.page import draw
from pipelines.report.templating import environment as templates
from pipelines.runtime import environment
from pipelines.runtime.comparison import COMPARISON, read_comparison
from pipelines.runtime.machine import available_cores
from pipelines.runtime.measures import in_words
from pipelines.runtime.prices import Prices, read_prices
from pipelines.runtime.publish import SHARED_REPORT
from posttrain.errors import PosttrainError
from posttrain.evaluation.statistics import Interval
from posttrain.files import write_atomic

FOLDER = Path(".posttrain") / "costs"
FIRST_SCREEN, COST_SECTION = "<!-- this machine: first screen -->", "<!-- this machine: cost -->"
"""Places in report/index.html; that file itself never depends on the clock."""
WITHOUT_COSTS = re.compile(rf"{COST_SECTION}(?:\s*<p class=\"note\">.*?</p>)?", re.DOTALL)
"""The place of the costs, with the paragraph on the page that has them."""
TARGET = 0.25
"""Orchestration should take less than this share of the time."""
SPENT = ("seconds", "money", "joules", "co2_grams")
PARTS = {"seconds/rollout": "sampling", "seconds/prepare": "judging", "seconds/train": "updating"}


def write_costs(project: Path) -> Path:
    """Read the measurements of this machine, write the page and return its path."""
    runs = all_runs(project)
    flow = flow_time(project, runs)
    prices = read_prices(project)
    rows = [_row(run, prices) for run in newest(runs)]
    tree: dict[str, Any] = {"flow": None if flow is None else _flow(flow), "runs": rows, "orchestration_target": TARGET}
    if prices is not None:
        tree |= {"currency": prices.currency, "money": sum(row["money"] or 0.0 for row in rows)}
        tree |= {"co2_grams": sum(row["co2_grams"] or 0.0 for row in rows)} if prices.grams_per_kwh is not None else {}
    folder = project / FOLDER
    values = {
        "rows": rows,
        "flow": flow,
        "target": TARGET,
        "parts": list(PARTS.values()),
        "longest": max((r["seconds"] for r in rows), default=1.0),
        "against_seconds": None,
        "prices": prices,
        "energy": any(row["joules"] is not None for row in rows),
        "carbon": prices is not None and prices.grams_per_kwh is not None,
        "unknown_energy": sorted({row["device"] for row in rows if row["co2_grams"] is None}),
        "judged": any(row["judges"] for row in rows),
        "unpriced": [] if prices is None else _unpriced(rows, prices),
    }
    page = templates().get_template("costs.html.j2").render(**values)
    write_atomic(folder / "costs.json", (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(folder / "index.html", page.encode())
    write_report_with_costs(project, rows, values)
    return folder / "index.html"


def write_report_with_costs(project: Path, rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    """Write .posttrain/report.html: the report with this machine's times in the page, as one file that can be copied."""
    report = project / "report" / "index.html"
    if not report.is_file() or not (project / COMPARISON).is_file():
        return
    found = read_comparison(project)
    seconds = _seconds(rows, [name for name in found["models"] if name not in (BASE, SFT)])
    best = found["best"]
    tile = _tile(best, seconds[best]) if best in seconds else ""
    values = values | {"against_seconds": _curves_against_seconds(project, found)}
    points = per_point(rows, found["models"], found["headline"])
    body = _place() + _against_seconds(found, seconds) + templates().get_template("costs_body.html.j2").render(**values)
    body += templates().get_template("points.html.j2").render(points=points, **values) if points else ""
    rates = win_rates(project)
    body += templates().get_template("people.html.j2").render(rates=rates) if rates else ""
    text = report.read_text(encoding="utf-8").replace(FIRST_SCREEN, tile)
    text = WITHOUT_COSTS.sub(lambda _: body, text, count=1)
    for name in ("comparison.json", "accuracy.csv", "pairwise.csv", "curves.csv"):
        text = text.replace(f'href="{name}"', f'href="../report/{name}"')
    write_atomic(project / SHARED_REPORT, text.encode())


def per_point(rows: Sequence[dict[str, Any]], models: Mapping[str, Any], measure: str) -> list[dict[str, Any]]:
    """Return the cost of a percentage point of the measure, gained over SFT, for each algorithm that was measured here.

    The cost is that of one run, the mean over seeds. Without a gain there is no cost of a point, and every value is None.
    """
    found: list[dict[str, Any]] = []
    for name, model in models.items():
        runs = [row for row in rows if re.fullmatch(rf"align-{re.escape(name)}-\d+", row["name"])]
        if name not in (BASE, SFT) and runs:
            gain = 100 * (model[measure]["mean"] - models[SFT][measure]["mean"])
            found.append({"name": name, "gain": gain} | {cost: _each(runs, cost, gain) for cost in SPENT})
    return found


def _each(runs: Sequence[dict[str, Any]], cost: str, gain: float) -> float | None:
    """Return the mean cost of a run for each point of the gain; None without a gain, or if the cost of a run is unknown."""
    values = [run[cost] for run in runs if run[cost] is not None]
    return sum(values) / len(values) / gain if gain > 0 and len(values) == len(runs) else None


def _curves_against_seconds(project: Path, tree: dict[str, Any]) -> Any:
    """Return the plot of the true reward against wall time, or None if the runs were not timed here."""
    from pipelines.report.wall_time import curves, picture  # matplotlib, which a page without a report does not need

    seeds = {name: model["seeds"] for name, model in tree["models"].items() if model["seeds"]}
    found = curves(project, newest(all_runs(project)), seeds, tree["accuracy_source"])
    return picture(found, list(seeds), tree["accuracy_source"])


def _seconds(rows: Sequence[dict[str, Any]], algorithms: Sequence[str]) -> dict[str, float]:
    """Return the seconds of one align run, the mean over the seeds, for each algorithm that was measured here."""
    found = {}
    for name in algorithms:
        runs = [row["seconds"] for row in rows if re.fullmatch(rf"align-{re.escape(name)}-\d+", row["name"])]
        if runs:
            found[name] = sum(runs) / len(runs)
    return found


def _place() -> str:
    """Return a paragraph with this machine and the commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores, commit = available_cores(), (environment.commit() or "")[:12]
    english = f"Measured on {platform.machine()}, {cores} CPU cores, {memory:.0f} GiB of memory; commit {commit or 'unknown'}."
    chinese = f"测量环境：{platform.machine()}，{cores} 个 CPU 核，{memory:.0f} GiB 内存；提交号 {commit or '未知'}。"
    return f'<p class="note">{_macros().t(english, chinese)}</p>\n'


def _tile(best: str, seconds: float) -> str:
    """Return the tile of the first screen with the wall time of one run."""
    said = _macros().t(f"one run of {best} here", f"{best} 单次运行（本机）")
    return f'<div class="tile"><b>{seconds:.0f} s</b><span>{said}</span></div>'


def _against_seconds(found: dict[str, Any], seconds: dict[str, float]) -> str:
    """Return the figure of the headline measure against wall time; empty if no algorithm was measured here."""
    if not seconds:
        return ""
    levels = {name: found["models"][name][found["headline"]] for name in seconds}
    points = [(name, seconds[name], Interval(**{"value" if k == "mean" else k: v for k, v in level.items()}))
              for name, level in levels.items()]  # fmt: skip
    algorithms = tuple(name for name in found["models"] if name not in (BASE, SFT))
    measure = in_words(found["headline"])
    drawn = draw(
        "result_against_seconds", "Result against wall time", "The headline measure of every algorithm against its seconds.", algorithms,
        lambda look: against_cost(points, "wall time of one run here, seconds", measure, look),
    )  # fmt: skip
    english = "The result of every algorithm against the wall time of one run on this machine, as loaded as it was."
    return str(_macros().figure(drawn, english, "每个算法的结果对单次运行在本机的耗时；耗时受当时机器负载影响。"))


def _macros() -> Any:
    """Return the macros of the report's templates."""
    return templates().get_template("macros.html.j2").module


def _row(run: RunMeasures, prices: Prices | None) -> dict[str, Any]:
    """Return one run as a row of the page."""
    return {
        "name": run.name,
        "device": run.device,
        "joules": run.joules,
        "judges": {name: {"input": tokens[0], "output": tokens[1]} for name, tokens in run.judge_tokens.items()},
        "judge_money": None if prices is None else prices.of_judges(run.judge_tokens),
        "money": None if prices is None else prices.total(run.device, run.seconds, run.judge_tokens),
        "co2_grams": None if prices is None else prices.grams(run.device, run.seconds, run.joules),
        "seconds": run.seconds,
        "attempts": len(run.spans),
        "steps": len(run.values.get("seconds/step", ())),
        "seconds_per_step": run.median("seconds/step"),
        "parts": {part: run.total(metric) for metric, part in PARTS.items()},
        "tokens_per_second": run.median("throughput/tokens_per_second"),
        "peak_memory_mib": run.greatest("memory/peak_mib"),
    }


def _unpriced(rows: Sequence[dict[str, Any]], prices: Prices) -> list[str]:
    """Return the devices and judges of the runs that have no price."""
    devices = {row["device"] for row in rows} - prices.hour.keys()
    return sorted(devices) + sorted({name for row in rows for name in row["judges"]} - prices.judge_tokens.keys())


def _flow(flow: FlowTime) -> dict[str, Any]:
    """Return the flow's times as JSON."""
    return {
        "wall_seconds": flow.wall,
        "overhead_seconds": flow.overhead,
        "orchestration_seconds": flow.orchestration,
        "orchestration_share": flow.share,
        "stages": {
            s.name: {
                "wall_seconds": s.wall,
                "work_seconds": s.work,
                "orchestration_seconds": s.orchestration,
                "ran": s.ran,
            }
            for s in flow.stages
        },
    }


def main() -> None:
    """Run the command line for the project of the working directory."""
    argparse.ArgumentParser(
        prog="python -m pipelines.report.costs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()  # fmt: skip
    try:
        print(write_costs(environment.root()))
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
