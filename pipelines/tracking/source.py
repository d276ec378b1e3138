"""Load recorded runs: live journals with their measurements, and finished journals restored from the DVC cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.runtime import environment
from pipelines.runtime.context import LOCK, MEASUREMENTS
from pipelines.runtime.energy import joules
from pipelines.runtime.journal import FINISHED, KILLED, RUNNING, Record, canonical, encode, ended, number, read
from pipelines.runtime.measures import with_measures
from pipelines.runtime.prices import judge_tokens
from pipelines.runtime.process import held
from pipelines.runtime.publish import JOURNAL
from pipelines.runtime.ranking import RECORD, Place, decode, earlier
from pipelines.runtime.ranking import encode as _ranking
from posttrain.errors import TrackingError
from posttrain.files import files_below

Value = tuple[str, int]
"""Metric name and step."""
START = "models/sft"
RESULT, COST = "eval/", "cost/"
"""Prefixes of the values that a training run has next to its curves. MLflow's table cuts names after about 13 letters."""
OLD_RESULT = "evaluation/"
"""The prefix of results in MLflow runs that were stored by earlier versions."""
_NO_RANKING = _ranking("", {})


@dataclass(frozen=True)
class RecordedRun:
    """One journal at the time of reading, with the status of its process."""

    folder: Path
    records: list[Record]
    measurements: list[Record]
    status: str
    evaluation: RecordedRun | None = None
    """The finished evaluation of exactly the model that this run wrote."""
    supervised: RecordedRun | None = None
    """The finished evaluation of the supervised model that an align run read."""
    place: Place | None = None
    """The place of an align run in the last comparison that read it."""

    @cached_property
    def start(self) -> Record:
        """Return the start record."""
        return next(record for record in self.records if record["kind"] == "start")

    @property
    def identity(self) -> str:
        """Return the run's identity."""
        return str(self.start["run"])

    def of(self, kind: str) -> list[Record]:
        """Return all records of a kind."""
        return [record for record in self.records if record["kind"] == kind]

    def values_of(self, kind: str) -> dict[str, Any]:
        """Return the merged values of all records of a kind."""
        return {name: value for record in self.of(kind) for name, value in record["values"].items()}

    @cached_property
    def journal(self) -> bytes:
        """Return the canonical journal; the bytes are the same from the live folder and from the run directory."""
        return "".join(map(encode, self.records)).encode()

    @property
    def digest(self) -> str:
        """Return the sha256 of the canonical journal."""
        return hashlib.sha256(self.journal).hexdigest()

    @cached_property
    def metrics(self) -> dict[Value, float]:
        """Return every value of the journal, the results of the model's evaluation, and the cost in work.

        A summary value that has a series is its last step, so it is not repeated. Results and cost are at step 0: MLflow draws
        them as bars.
        """
        series = {
            (name, record["step"]): number(value)
            for record in self.of("metrics")
            for name, value in record["values"].items()
        }
        names = {name for name, _ in series}
        last = max((step for _, step in series), default=0)
        found = measured(self) if self.start["stage"] == "evaluate" else self.values_of("summary")
        summary = {(name, last): number(value) for name, value in found.items() if name not in names}
        cost = {(f"{COST}{name}", 0): value for name, value in self._work(series, last).items()}
        return series | summary | cost | ({} if self.evaluation is None else results(self.evaluation))

    def _work(self, series: dict[Value, float], last: int) -> dict[str, float]:
        """Return the tokens that a finished training run sampled and trained on."""
        if self.status != FINISHED:
            return {}
        ends = {name: series.get((name, last)) for name in ("tokens/sampled", "tokens/trained")}
        return {name.replace("/", "_"): value for name, value in ends.items() if value is not None}

    @cached_property
    def timings(self) -> dict[Value, float]:
        """Return the values that depend on the clock, one per name and step."""
        values = {
            (name, record["step"]): number(value)
            for record in self.measurements
            if record["kind"] == "timings"
            for name, value in record["values"].items()
        }
        seconds = self._seconds()
        spent = {"seconds": round(seconds, 1) if seconds else None, "joules": joules(self.measurements)}
        asked = judge_tokens(self.measurements).values()
        if asked:
            spent |= {"judge_tokens_input": sum(i for i, _ in asked), "judge_tokens_output": sum(o for _, o in asked)}
        known = {(f"{COST}{name}", 0): value for name, value in spent.items() if value is not None}
        return values | (known if self.status == FINISHED else {})

    @property
    def seconds(self) -> float | None:
        """Return the seconds of a finished run on this machine, or None."""
        return self.timings.get((f"{COST}seconds", 0))

    def _seconds(self) -> float:
        """Return the seconds from the start to the last record of each process of the run."""
        total, began, reached = 0.0, 0.0, 0.0
        for record in self.measurements:
            if record["kind"] == "start":
                total, began = total + reached - began, float(record["time"])
                reached = began
            reached = max(reached, float(record["time"]))
        return total + reached - began if began else 0.0

    @cached_property
    def times(self) -> dict[int, int]:
        """Return the time of each step, in milliseconds since the epoch."""
        return {r["step"]: _milliseconds(r["time"]) for r in self.measurements if "step" in r}

    def surroundings(self) -> Record:
        """Return commit, flow, DVC stage and experiment of the last start. Empty for a restored journal."""
        return next((record for record in reversed(self.measurements) if record["kind"] == "start"), {})

    def device(self) -> str | None:
        """Return the device that the run computed on, e.g. `cuda: NVIDIA H200`; None if it is not known."""
        return next((r["device"] for r in reversed(self.measurements) if r["kind"] == "ready" and "device" in r), None)

    def kernels(self) -> dict[str, str | None]:
        """Return the names of the attention and the head that the run computed with; None if one is not known."""
        found: Record = next((r for r in reversed(self.measurements) if r["kind"] == "kernels"), {})
        return {name: found.get(name) for name in ("attention", "head")}

    def started(self) -> int | None:
        """Return the start time in milliseconds since the epoch, or None."""
        times = [record["time"] for record in self.measurements if record["kind"] == "start"]
        return _milliseconds(times[0]) if times else None

    def stopped(self) -> int | None:
        """Return the time of the last measurement in milliseconds since the epoch, or None."""
        return _milliseconds(self.measurements[-1]["time"]) if self.measurements else None


def _aligns(source: RecordedRun) -> bool:
    return bool(source.start["stage"] == "align")


def results(evaluation: RecordedRun) -> dict[Value, float]:
    """Return an evaluation's results by the names that they have on the run of the evaluated model, at step 0."""
    return {
        (RESULT + name.replace("/mean", "").replace("/", "_"), 0): number(value)
        for name, value in measured(evaluation).items()
    }


def measured(evaluation: RecordedRun) -> dict[str, Any]:
    """Return the results of an evaluation by their names in its journal, with both measures of accuracy under their names."""
    return with_measures(evaluation.values_of("summary"), evaluation.values_of("params").get("evaluation.accuracy"))


def evaluated_folder(evaluation: RecordedRun) -> str:
    """Return the folder of the model that was evaluated: models/sft, or models/align/grpo-0."""
    model = str(evaluation.start["arguments"].get("model"))
    return f"models/{model}" if model in ("base", "sft") else f"models/align/{model}"


def _places(order: list[RecordedRun]) -> dict[str, Place]:
    """Return the place of each run by its identity: that in the last comparison, or none if only earlier ones read the run."""
    found: dict[str, Place] = {}
    for source in order:
        if source.start["stage"] == "compare" and source.status == FINISHED:
            found = {run: earlier(place) for run, place in found.items()}
            found |= decode(source.values_of("tags").get(RECORD, _NO_RANKING))
    return found


def _milliseconds(seconds: float) -> int:
    """Convert seconds to whole milliseconds."""
    return int(seconds * 1000)


def load(folder: Path) -> RecordedRun | None:
    """Load the journal in a folder; None if it has no start record yet."""
    raw = read(folder / JOURNAL)
    if not any(record["kind"] == "start" for record in raw):
        return None
    # Check the lock before reading the journal again: a process that ends in between is then reported as ended.
    alive = held(folder / LOCK)
    raw = read(folder / JOURNAL)
    status = ended(raw) or (RUNNING if alive else KILLED)
    return RecordedRun(folder, canonical(raw), read(folder / MEASUREMENTS), status)


def folders(project: Path) -> Iterator[Path]:
    """Yield every folder that holds a journal: live folders first, then run directories."""
    live = environment.states(project)
    yield from (path.parent for path in files_below(live) if path.name == JOURNAL and path.parent.parent == live)
    yield from (path.parent for path in files_below(project / "runs") if path.name == JOURNAL)


def discover(project: Path, problems: list[str]) -> list[RecordedRun]:
    """Return one recorded run per identity, and append an error for each damaged journal to `problems`.

    A live folder is preferred, because it also has times; but a finished journal is preferred to one that was cut off.
    """
    found: dict[str, RecordedRun] = {}
    current: set[str] = set()
    for folder in folders(project):
        try:
            source = load(folder)
        except TrackingError as error:
            problems.append(str(error))
            continue
        if source is None:
            continue
        if folder.is_relative_to(project / "runs"):
            current.add(source.identity)
        known = found.get(source.identity)
        if known is None or known.status not in (FINISHED, RUNNING):
            found[source.identity] = source
    return _with_evaluations(list(found.values()), current)


def _with_evaluations(sources: list[RecordedRun], current: set[str]) -> list[RecordedRun]:
    """Attach to each run that wrote a model its evaluation; of several, that in runs/, else the last one that ran."""
    order = sorted(sources, key=lambda source: (source.identity in current, source.stopped() or 0))
    evaluations = {
        (folder, source.start["inputs"].get(folder)): source
        for source in order
        if source.start["stage"] == "evaluate" and source.status == FINISHED
        for folder in [evaluated_folder(source)]
    }
    ranking = _places(order)
    found = []
    for source in sources:
        model = next(iter(source.of("model")), {})
        evaluation = evaluations.get((str(model["path"]), str(model["content"]))) if "content" in model else None
        supervised = evaluations.get((START, source.start.get("inputs", {}).get(START))) if _aligns(source) else None
        place = ranking.get(source.identity)
        known = evaluation is not None or supervised is not None or place is not None
        found.append(replace(source, evaluation=evaluation, supervised=supervised, place=place) if known else source)
    return found
