"""Load recorded runs: live journals with their measurements, and finished journals restored from the DVC cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.runtime import environment
from pipelines.runtime.context import LOCK, MEASUREMENTS
from pipelines.runtime.journal import FINISHED, KILLED, RUNNING, Record, canonical, encode, ended, number, read
from pipelines.runtime.process import held
from pipelines.runtime.publish import JOURNAL
from posttrain.errors import TrackingError

Value = tuple[str, int]
"""Metric name and step."""


@dataclass(frozen=True)
class RecordedRun:
    """One journal at the time of reading, with the status of its process."""

    folder: Path
    records: list[Record]
    measurements: list[Record]
    status: str

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
        """Return every value of the journal: the series, and the summary at the last step."""
        series = {
            (name, record["step"]): number(value)
            for record in self.of("metrics")
            for name, value in record["values"].items()
        }
        names = {name for name, _ in series}
        last = max((step for _, step in series), default=0)
        summary = self.values_of("summary")
        final = {(f"final/{name}" if name in names else name, last): number(value) for name, value in summary.items()}
        return series | final

    @cached_property
    def timings(self) -> dict[Value, float]:
        """Return the values that depend on the clock, one per name and step."""
        return {
            (name, record["step"]): number(value)
            for record in self.measurements
            if record["kind"] == "timings"
            for name, value in record["values"].items()
        }

    @cached_property
    def times(self) -> dict[int, int]:
        """Return the time of each step, in milliseconds since the epoch."""
        return {r["step"]: _milliseconds(r["time"]) for r in self.measurements if "step" in r}

    def surroundings(self) -> Record:
        """Return commit, flow, DVC stage and experiment of the last start. Empty for a restored journal."""
        return next((record for record in reversed(self.measurements) if record["kind"] == "start"), {})

    def started(self) -> int | None:
        """Return the start time in milliseconds since the epoch, or None."""
        times = [record["time"] for record in self.measurements if record["kind"] == "start"]
        return _milliseconds(times[0]) if times else None

    def stopped(self) -> int | None:
        """Return the time of the last measurement in milliseconds since the epoch, or None."""
        return _milliseconds(self.measurements[-1]["time"]) if self.measurements else None


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
    yield from sorted(path.parent for path in environment.states(project).glob(f"*/{JOURNAL}"))
    yield from sorted(path.parent for path in (project / "runs").rglob(JOURNAL))


def discover(project: Path, problems: list[str]) -> list[RecordedRun]:
    """Return one recorded run per identity, and append an error for each damaged journal to `problems`.

    A live folder is preferred, because it also has times; but a finished journal is preferred to one that was cut off.
    """
    found: dict[str, RecordedRun] = {}
    for folder in folders(project):
        try:
            source = load(folder)
        except TrackingError as error:
            problems.append(str(error))
            continue
        if source is None:
            continue
        known = found.get(source.identity)
        if known is None or known.status not in (FINISHED, RUNNING):
            found[source.identity] = source
    return list(found.values())
