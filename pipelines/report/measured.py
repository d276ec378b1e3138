"""Load time and memory measurements: of every run, and of the last flow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime.context import MEASUREMENTS
from pipelines.runtime.energy import joules
from pipelines.runtime.environment import states
from pipelines.runtime.journal import Record, read
from pipelines.runtime.prices import judge_tokens
from posttrain.errors import TrackingError

FLOW = Path(".posttrain") / "flow.json"
_KEY_CHARACTERS = 17  # "-" and 16 hexadecimal digits at the end of a run's folder

Span = tuple[float, float]


@dataclass
class RunMeasures:
    """The measurements of one run of a stage. Spans are Unix seconds of work, without the imports."""

    name: str
    stage: str | None
    """The stage's name in DVC; None if the step was started by hand."""
    spans: list[Span] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    device: str = "cpu"
    """As the step recorded it; a step without a model runs on the CPU."""
    joules: float | None = None
    """Energy of processor packages and GPUs during the run, with everything else that ran on them; None if it is not known."""
    judge_tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Tokens of questions and of replies that were paid for, by the judge's model."""

    @property
    def seconds(self) -> float:
        """Return the seconds of work."""
        return sum(end - start for start, end in self.spans)

    def total(self, metric: str) -> float | None:
        """Return the sum of a metric, or None."""
        return sum(self.values[metric]) if metric in self.values else None

    def greatest(self, metric: str) -> float | None:
        """Return the maximum of a metric, or None."""
        return max(self.values[metric]) if metric in self.values else None

    def median(self, metric: str) -> float | None:
        """Return the median of a metric, or None."""
        return float(np.median(self.values[metric])) if metric in self.values else None


@dataclass(frozen=True)
class StageTime:
    """One stage of a flow: its wall time from slot to result, and the part spent in the step's body."""

    name: str
    wall: float
    work: float
    ran: bool

    @property
    def orchestration(self) -> float:
        """Return the seconds outside the step's body."""
        return self.wall - self.work


@dataclass(frozen=True)
class FlowTime:
    """Times of the last flow. `overhead` is the time without any running stage."""

    wall: float
    overhead: float
    stages: list[StageTime]

    @property
    def ran(self) -> list[StageTime]:
        """Return the stages that ran."""
        return [stage for stage in self.stages if stage.ran]

    @property
    def orchestration(self) -> float:
        """Return the seconds that were not a step's work, summed over stages, plus the flow's overhead."""
        return self.overhead + sum(stage.orchestration for stage in self.stages)

    @property
    def share(self) -> float | None:
        """Return orchestration as a share of all stage time and overhead; None if no stage ran."""
        total = self.overhead + sum(stage.wall for stage in self.stages)
        return self.orchestration / total if self.ran and total > 0 else None


def all_runs(project: Path) -> list[RunMeasures]:
    """Return every run of this machine that has measurements, sorted by its start."""
    files = sorted(states(project).glob(f"*/{MEASUREMENTS}"))
    found = [run for path in files if (run := _run(path.parent.name[:-_KEY_CHARACTERS], read(path))).spans]
    return sorted(found, key=lambda run: (run.spans[0][0], run.name))


def newest(runs: Iterable[RunMeasures]) -> list[RunMeasures]:
    """Return, for each name, the run that was active last; older runs had different parameters or inputs."""
    latest: dict[str, RunMeasures] = {}
    for run in runs:
        if run.name not in latest or run.spans[-1] > latest[run.name].spans[-1]:
            latest[run.name] = run
    return sorted(latest.values(), key=lambda run: (run.spans[0][0], run.name))


def training_seconds(runs: Iterable[RunMeasures], algorithms: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """Return the seconds of one align run of each algorithm, the mean over its seeds.

    Algorithms of which a run was restored or trained elsewhere are left out: its time on this machine is unknown.
    """
    known = {run.name: run.seconds for run in newest(runs)}
    names = {algorithm: [f"align-{algorithm}-{seed}" for seed in seeds] for algorithm in algorithms}
    return {a: float(np.mean([known[n] for n in own])) for a, own in names.items() if all(n in known for n in own)}


def _run(name: str, records: Sequence[Record]) -> RunMeasures:
    """Read the measurements of one run."""
    run = RunMeasures(name, None)
    run.joules, run.judge_tokens = joules(records), judge_tokens(records)
    for record in records:
        time = float(record["time"])
        if record["kind"] == "start":
            run.stage = record.get("dvc_stage") or run.stage
            run.spans.append((time, time))
        elif record["kind"] == "ready" and run.spans:
            run.spans[-1] = (time, time)
            run.device = record.get("device") or run.device
        elif run.spans:
            run.spans[-1] = (run.spans[-1][0], max(time, run.spans[-1][1]))
        for metric, value in record.get("values", {}).items():
            run.values.setdefault(metric, []).append(float(value))
    return run


def flow_time(project: Path, runs: Sequence[RunMeasures]) -> FlowTime | None:
    """Return the last flow's times, or None if no flow has run here."""
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
            f"{path}: not a record of a flow ({error!r}), so the page of costs cannot be written. Remove it; the next"
            " flow writes a new one."
        ) from None
    stages = [
        StageTime(name, window[1] - window[0], _work(name, window, runs), ran[name])
        for name, window in sorted(windows.items(), key=lambda item: (item[1], item[0]))
    ]
    return FlowTime(end - start, (end - start) - union([overlap(w, (start, end)) for w in windows.values()]), stages)


def _work(stage: str, window: Span, runs: Sequence[RunMeasures]) -> float:
    """Return the seconds in which the stage's runs worked."""
    return union([overlap(span, window) for run in runs if run.stage == stage for span in run.spans])


def overlap(a: Span, b: Span) -> Span:
    """Return the common part of two spans; without one, an empty span at the later start."""
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


def union(spans: Iterable[Span]) -> float:
    """Return the seconds covered by at least one span."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
