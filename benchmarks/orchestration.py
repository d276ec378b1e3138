"""Measure Prefect's overhead at a flow's start, per stage, and at its end, with a private server and stages that do nothing.

    python benchmarks/orchestration.py [--stages 8] [--repeats 3] [--database URL] [--write]

A chain of stages runs through flows.compare on one slot, and through `dvc repro --single-item` without Prefect. The flow's start is the
time from the command to the first stage's start. A stage's overhead is its time in the flow, including the gap to the next stage, minus
the time of the same `dvc repro --single-item`. --write puts the table into benchmarks/orchestration.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import flows  # noqa: F401  (Prefect's quiet environment)
from flows.server import wait_until_healthy
from posttrain.network import free_port
from tasks.process import child_environment, end, start

PROJECT = Path(__file__).parents[1]


def workspace(folder: Path, stages: int) -> Path:
    """Create a chain of stages that copy one byte."""
    folder.mkdir()
    (folder / "out-0").write_text("x")
    lines = ["stages:"]
    for i in range(1, stages + 1):
        lines += [f"  s{i}:", f"    cmd: cp out-{i - 1} out-{i}", f"    deps: [out-{i - 1}]", f"    outs: [out-{i}]"]
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, env=child_environment(), check=True)
    return folder


@contextmanager
def prefect(folder: Path, database: str | None) -> Iterator[str]:
    port = free_port(0)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    extra = {"PREFECT_HOME": str(folder / "home")}
    if database:
        extra["PREFECT_API_DATABASE_CONNECTION_URL"] = database
    with (folder / "prefect.log").open("wb") as log:
        server = start(command, folder, output=log, extra=extra, grace_seconds=5)
    try:
        wait_until_healthy(server, port, folder / "prefect.log")
        yield f"http://127.0.0.1:{port}/api"
    finally:
        server.terminate()
        end(server, 20)


def flow(root: Path, api: str) -> dict[str, float]:
    """Return the seconds of one run of flows.compare over stale stages."""
    environment = {
        "PREFECT_API_URL": api,
        "POSTTRAIN_SLOTS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(PROJECT),
    }
    environment["POSTTRAIN_LEASES"] = str(root.parent / "leases")
    typed = time.time()
    command = [sys.executable, "-m", "flows.compare", "--root", str(root), "--no-tracking"]
    done = subprocess.run(command, cwd=PROJECT, env={**os.environ, **environment}, capture_output=True, text=True)
    returned = time.time()
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    record = json.loads((root / ".posttrain" / "flow.json").read_text())
    stages = sorted(record["stages"].values(), key=lambda stage: stage["started"])
    gaps = [after["started"] - before["ended"] for before, after in pairwise(stages)]
    inside = statistics.mean(stage["ended"] - stage["started"] for stage in stages)
    return {
        "flow's start": stages[0]["started"] - typed,
        "a stage in the flow": inside + statistics.mean(gaps),
        "flow's end": returned - stages[-1]["ended"],
    }


def bare(root: Path, stages: int) -> float:
    """Return the seconds of one stage with only dvc."""
    began = time.monotonic()
    for i in range(1, stages + 1):
        command = [sys.executable, "-m", "dvc", "repro", "-q", "--single-item", f"s{i}"]
        subprocess.run(command, cwd=root, env=child_environment(), check=True)
    return (time.monotonic() - began) / stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--database", help="SQLAlchemy URL of the Prefect server (default: SQLite)")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/orchestration.md")
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with prefect(folder, options.database) as api:
            for i in range(options.repeats):
                for key, value in flow(workspace(folder / f"flow-{i}", options.stages), api).items():
                    rows.setdefault(key, []).append(value)
                alone = bare(workspace(folder / f"bare-{i}", options.stages), options.stages)
                rows.setdefault("a stage by dvc alone", []).append(alone)
                rows.setdefault("overhead of a stage", []).append(rows["a stage in the flow"][-1] - alone)
    report = table(rows, options)
    print(report)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(report, encoding="utf-8")


def table(rows: dict[str, list[float]], options: argparse.Namespace) -> str:
    command = f"python benchmarks/orchestration.py --stages {options.stages} --repeats {options.repeats}"
    database = "the database given" if options.database else "SQLite"
    lines = [
        "# What Prefect adds",
        "",
        f"`{command}`: a chain of stages that copy one byte, through `flows.compare` against a Prefect server over {database}, and by"
        f" `dvc repro --single-item` alone, in turn. {os.cpu_count()} processor cores.",
        "",
        "| seconds | median | least | most | bar |",
        "|---|---|---|---|---|",
    ]
    bars = {"flow's start": "< 8", "overhead of a stage": "< 2"}
    for key, values in rows.items():
        numbers = " | ".join(f"{number:.2f}" for number in (statistics.median(values), min(values), max(values)))
        lines.append(f"| {key} | {numbers} | {bars.get(key, '')} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
