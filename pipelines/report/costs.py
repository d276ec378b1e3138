"""Write the page of machine costs: wall time, share of orchestration, memory and throughput of the runs on this machine.

    python -m pipelines.report.costs

Writes .posttrain/costs/index.html and costs.json, and .posttrain/report.html, which is the report with these times in it. They depend
on the clock, so they are not part of report/ or of any result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from pipelines.report.measured import FlowTime, RunMeasures, all_runs, flow_time, newest
from pipelines.report.templating import environment as templates
from pipelines.runtime import environment
from pipelines.runtime.machine import available_cores
from pipelines.runtime.publish import SHARED_REPORT
from posttrain.errors import PosttrainError
from posttrain.files import write_atomic

FOLDER = Path(".posttrain") / "costs"
FIRST_SCREEN, COST_SECTION = "<!-- this machine: first screen -->", "<!-- this machine: cost -->"
"""Places in report/index.html; that file itself never depends on the clock."""
TARGET = 0.25
"""Orchestration should take less than this share of the time."""
PARTS = {"seconds/rollout": "sampling", "seconds/prepare": "judging", "seconds/train": "updating"}


def write_costs(project: Path) -> Path:
    """Read the measurements of this machine, write the page and return its path."""
    runs = all_runs(project)
    flow = flow_time(project, runs)
    rows = [_row(run) for run in newest(runs)]
    tree = {"flow": None if flow is None else _flow(flow), "runs": rows, "orchestration_target": TARGET}
    folder = project / FOLDER
    values = {
        "rows": rows,
        "flow": flow,
        "target": TARGET,
        "parts": list(PARTS.values()),
        "longest": max((r["seconds"] for r in rows), default=1.0),
        "against_seconds": None,
    }
    page = templates().get_template("costs.html.j2").render(**values)
    write_atomic(folder / "costs.json", (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(folder / "index.html", page.encode())
    write_report_with_costs(project, rows, values)
    return folder / "index.html"


def write_report_with_costs(project: Path, rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    """Write .posttrain/report.html: the report with this machine's times in the page, as one file that can be copied."""
    report, numbers = project / "report" / "index.html", project / "report" / "comparison.json"
    if not report.is_file() or not numbers.is_file():
        return
    tree = json.loads(numbers.read_text(encoding="utf-8"))
    best = tree["best"]
    seconds = [row["seconds"] for row in rows if best and re.fullmatch(rf"align-{re.escape(best)}-\d+", row["name"])]
    tile = (
        f'<div class="tile"><b>{sum(seconds) / len(seconds):.0f} s</b><span>one run of {best} here</span></div>'
        if seconds
        else ""
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about = f"{platform.machine()}, {available_cores()} CPU cores, {memory:.0f} GiB of memory"
    place = f'<p class="note">Measured on {about}; commit {environment.commit() or "unknown"}.</p>\n'
    values = values | {"against_seconds": _against_seconds(project, tree)}
    body = place + templates().get_template("costs_body.html.j2").render(**values)
    text = report.read_text(encoding="utf-8").replace(FIRST_SCREEN, tile).replace(COST_SECTION, body)
    for name in ("comparison.json", "accuracy.csv", "pairwise.csv", "curves.csv"):
        text = text.replace(f'href="{name}"', f'href="../report/{name}"')
    write_atomic(project / SHARED_REPORT, text.encode())


def _against_seconds(project: Path, tree: dict[str, Any]) -> Any:
    """Return the plot of the true reward against wall time, or None if the runs were not timed here."""
    from pipelines.report.wall_time import curves, picture  # matplotlib, which a page without a report does not need

    seeds = {name: model["seeds"] for name, model in tree["models"].items() if model["seeds"]}
    found = curves(project, newest(all_runs(project)), seeds, tree["accuracy_source"])
    return picture(found, list(seeds), tree["accuracy_source"])


def _row(run: RunMeasures) -> dict[str, Any]:
    """Return one run as a row of the page."""
    return {
        "name": run.name,
        "seconds": run.seconds,
        "attempts": len(run.spans),
        "steps": len(run.values.get("seconds/step", ())),
        "seconds_per_step": run.median("seconds/step"),
        "parts": {part: run.total(metric) for metric, part in PARTS.items()},
        "tokens_per_second": run.median("throughput/tokens_per_second"),
        "peak_memory_mib": run.greatest("memory/peak_mib"),
    }


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
