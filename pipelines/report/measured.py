"""What the clock and the machine said: measurements of every run, and the record that a flow leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime.context import MEASUREMENTS
from pipelines.runtime.environment import states
from pipelines.runtime.journal import Record, read
from posttrain.errors import TrackingError

FLOW = Path(".posttrain") / "flow.json"
_KEY_CHARACTERS = 17  # "-" and 16 hexadecimal digits at the end of a run's folder

Span = tuple[float, float]


@dataclass
class RunMeasures:
    """The newest run of one stage instance on this machine. Spans are Unix seconds of work: imports come before them."""

    name: str
    stage: str | None
    """The stage as DVC calls it; None where the step was run by hand."""
    spans: list[Span] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(end - start for start, end in self.spans)

    def total(self, metric: str) -> float | None:
        return sum(self.values[metric]) if metric in self.values else None

    def greatest(self, metric: str) -> float | None:
        return max(self.values[metric]) if metric in self.values else None

    def median(self, metric: str) -> float | None:
        return float(np.median(self.values[metric])) if metric in self.values else None


@dataclass(frozen=True)
class StageTime:
    """One stage of a flow: its wall time from slot to result, and the part of it inside the step's body."""

    name: str
    wall: float
    work: float
    ran: bool

    @property
    def orchestration(self) -> float:
        return self.wall - self.work


@dataclass(frozen=True)
class FlowTime:
    """The last flow. `overhead` is the time in which no stage was under way."""

    wall: float
    overhead: float
    stages: list[StageTime]

    @property
    def ran(self) -> list[StageTime]:
        return [stage for stage in self.stages if stage.ran]

    @property
    def orchestration(self) -> float:
        """Seconds that were not the work of a step, summed over stages, and the flow's own."""
        return self.overhead + sum(stage.orchestration for stage in self.stages)

    @property
    def share(self) -> float | None:
        """Orchestration as a part of all stage time and the flow's own; None where nothing was stale."""
        total = self.overhead + sum(stage.wall for stage in self.stages)
        return self.orchestration / total if self.ran and total > 0 else None


def all_runs(project: Path) -> list[RunMeasures]:
    """Every run folder of this machine that has measurements, in the order in which they began."""
    files = sorted(states(project).glob(f"*/{MEASUREMENTS}"))
    found = [run for path in files if (run := _run(path.parent.name[:-_KEY_CHARACTERS], read(path))).spans]
    return sorted(found, key=lambda run: (run.spans[0][0], run.name))


def newest(runs: Iterable[RunMeasures]) -> list[RunMeasures]:
    """Of every name the run that was active last: others had other params or inputs."""
    latest: dict[str, RunMeasures] = {}
    for run in runs:
        if run.name not in latest or run.spans[-1] > latest[run.name].spans[-1]:
            latest[run.name] = run
    return sorted(latest.values(), key=lambda run: (run.spans[0][0], run.name))


def _run(name: str, records: Sequence[Record]) -> RunMeasures:
    run = RunMeasures(name, None)
    for record in records:
        time = float(record["time"])
        if record["kind"] == "start":
            run.stage = record.get("dvc_stage") or run.stage
            run.spans.append((time, time))
        elif record["kind"] == "ready" and run.spans:
            run.spans[-1] = (time, time)
        elif run.spans:
            run.spans[-1] = (run.spans[-1][0], max(time, run.spans[-1][1]))
        for metric, value in record.get("values", {}).items():
            run.values.setdefault(metric, []).append(float(value))
    return run


def flow_time(project: Path, runs: Sequence[RunMeasures]) -> FlowTime | None:
    """The last flow's times, or None where no flow has run here."""
    path = project / FLOW
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        start, end = float(record["started"]), float(record["ended"])
        windows = {name: (float(s["started"]), float(s["ended"])) for name, s in sorted(record["stages"].items())}
        ran = {name: bool(stage.get("ran", True)) for name, stage in record["stages"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(
            f"{path} is not a flow's record ({error!r}). Remove it; the next flow writes a new one."
        ) from None
    stages = [
        StageTime(name, window[1] - window[0], _work(name, window, runs), ran[name])
        for name, window in sorted(windows.items(), key=lambda item: (item[1], item[0]))
    ]
    return FlowTime(end - start, (end - start) - union([overlap(w, (start, end)) for w in windows.values()]), stages)


def _work(stage: str, window: Span, runs: Sequence[RunMeasures]) -> float:
    return union([overlap(span, window) for run in runs if run.stage == stage for span in run.spans])


def overlap(a: Span, b: Span) -> Span:
    """The common part of two spans; an empty one at the later start if there is none."""
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def union(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one span."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
