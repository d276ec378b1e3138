"""Measure the cost of journal and MLflow per training step: bare steps of 200 ms, with the journal, and with an MLflow follower.

    python benchmarks/journal.py [--steps 60] [--rounds 3] [--write]

Each round runs the three modes in turn, so that a slow phase of the machine affects all of them. A step is a fixed number of matrix
products on one thread. It records 20 metrics and 4 timings, and every 10th step a table of 4 samples. The follower is
`python -m pipelines.commands.sync --follow` with SQLite. Reported are the median step, the wall time and processor time inside the
recording calls, and the follower's processor time. --write puts the table into benchmarks/journal.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from pipelines.config.params import load_params
from pipelines.runtime.context import LOCK, RunContext
from pipelines.runtime.process import Lock
from pipelines.runtime.run import Run
from pipelines.tracking.store import open_client

MODES = ("bare", "journal", "journal and MLflow")
STEP_SECONDS, METRICS, SIZE = 0.2, 20, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/journal.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    products = calibrated()
    steps: dict[str, list[float]] = {mode: [] for mode in MODES}
    recording: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    shares = []
    for number in range(args.rounds):
        for mode in MODES:
            with tempfile.TemporaryDirectory() as folder:
                share = one(Path(folder), mode, number, products, args.steps, steps[mode], recording[mode])
            shares += [] if share is None else [share]
    report = table(steps, recording, shares, products, args)
    print(report)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(report, encoding="utf-8")


def table(
    steps: dict[str, list[float]],
    recording: dict[str, list[tuple[float, float]]],
    shares: list[float],
    products: int,
    args: argparse.Namespace,
) -> str:
    lines = [
        "# What recording costs a training step",
        "",
        f"`python benchmarks/journal.py --steps {args.steps} --rounds {args.rounds}`: {METRICS} metrics and 4 timings a step, a table every"
        f" tenth, the follower over SQLite beside it. {args.rounds} x {args.steps} steps a row, torch {torch.__version__},"
        f" {products} products of {SIZE} x {SIZE} a step.",
        "",
        "| | step, ms (median) | recording by the clock, ms (median, 99 %) | share of 200 ms (median) | by the processor, ms (mean) |",
        "|---|---|---|---|---|",
    ]
    for mode in MODES:
        clock = sorted(by_clock for by_clock, _ in recording[mode])
        middle, high = statistics.median(clock), clock[int(0.99 * (len(clock) - 1))]
        processor = statistics.mean(by_processor for _, by_processor in recording[mode])
        lines.append(
            f"| {mode} | {1e3 * statistics.median(steps[mode]):.1f} | {1e3 * middle:.2f}, {1e3 * high:.2f} |"
            f" {100 * middle / STEP_SECONDS:.2f} % | {1e3 * processor:.2f} |"
        )
    used = f"{100 * statistics.mean(shares):.1f} % of one core"
    lines += ["", f"The follower, a process of its own whose passes run at low priority, used {used}.", ""]
    return "\n".join(lines)


def calibrated() -> int:
    """Return the number of matrix products that take STEP_SECONDS on this machine."""
    matrix = torch.rand(SIZE, SIZE)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 2.0:
        matrix @ matrix
        count += 1
    return round(count * STEP_SECONDS / (time.perf_counter() - started))


def one(
    folder: Path,
    mode: str,
    number: int,
    products: int,
    count: int,
    steps: list[float],
    recording: list[tuple[float, float]],
) -> float | None:
    """Run `count` steps and return the share of one core that the follower used."""
    run = opened(folder, f"bench-{number:016d}")
    process = followed(folder, run) if mode == MODES[2] else None
    used = sum(process.cpu_times()[:2]) if process else 0.0
    matrix, began = torch.rand(SIZE, SIZE), time.perf_counter()
    for step in range(count):
        started = time.perf_counter()
        for _ in range(products):
            matrix @ matrix
        worked, used_before = time.perf_counter(), time.process_time()
        if mode != MODES[0]:
            record(run, step)
        ended = time.perf_counter()
        steps.append(ended - started)
        recording.append((ended - worked, time.process_time() - used_before))
    if process is None:
        return None
    share = (sum(process.cpu_times()[:2]) - used) / (time.perf_counter() - began)
    process.terminate()
    process.wait()
    return share


def record(run: Run, step: int) -> None:
    run.recorder.metrics(step, {f"group/metric_{i}": (step + 1) / (i + 3) for i in range(METRICS)})
    run.recorder.timings(step, {f"seconds/part_{i}": 0.1 / (i + 1) for i in range(4)})
    if step % 10 == 9:
        run.recorder.table(
            "samples", step, [{"prompt": "1+1=", "completion": "2" * 60, "reward": 0.5} for _ in range(4)]
        )


def opened(folder: Path, name: str) -> Run:
    (folder / "params.yaml").write_bytes(Path(__file__).parents[1].joinpath("params.yaml").read_bytes())
    params = load_params(folder / "params.yaml")
    state = folder / ".posttrain" / "runs" / name
    context = RunContext(
        stage="bench", name="bench", params=params, args=argparse.Namespace(), directory=Path("runs/bench"), state=state,
        key="0" * 64, code="0" * 64,
    )  # fmt: skip
    run = Run.create(context)
    start = {"kind": "start", "stage": "bench", "name": "bench", "key": context.key, "run": name, "arguments": {},
             "directory": "runs/bench", "inputs": {}}  # fmt: skip
    assert Lock(state / LOCK).acquire()  # for as long as this process lives: the run is alive
    run.recorder.open(start, {"kind": "params", "values": {}}, {"kind": "start"})
    return run


def followed(folder: Path, run: Run) -> psutil.Process:
    """Start a follower of the run and wait until it has created its MLflow run."""
    open_client(folder).search_experiments()
    command = [sys.executable, "-m", "pipelines.commands.sync", "--follow", "--run", run.context.identity]
    process = psutil.Popen(command, cwd=folder, stdin=subprocess.PIPE)
    mark = folder / ".posttrain" / "tracking" / run.context.identity
    while not mark.is_file():
        assert process.is_running()
        time.sleep(0.1)
    return process


if __name__ == "__main__":
    main()
