"""Record metrics and tables of a run; each call appends to the journal before it returns.

Values that depend on the clock go only to the measurements, never to the journal.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.runtime.context import CHECKPOINTS, FAULTS, MEASUREMENTS, RunContext
from pipelines.runtime.energy import gpu_counters, read_counters
from pipelines.runtime.journal import Journal, Record, ended, representable
from pipelines.runtime.outputs import artifact_path
from pipelines.runtime.publish import ARTIFACTS, JOURNAL
from pipelines.runtime.redaction import redacted
from posttrain.errors import TrackingError
from posttrain.files import write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@./:-]*")


class RunRecorder:
    """Write the journal and the measurements of a run. A process that does not record writes to a temporary folder."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._scratch = None if context.records else TemporaryDirectory(prefix="posttrain-")
        self.folder = Path(self._scratch.name) if self._scratch else context.state
        self.journal = Journal(self.folder / JOURNAL)
        self.resumed = False
        """True if an earlier process of the same run was cut off and this one continues its journal."""
        self._measurements = Journal(self.folder / MEASUREMENTS, durable=False)
        self._last: dict[str, int] = {}

    def stop_requested(self) -> bool:
        """Return True if a signal asked the run to stop."""
        return self._context.stop_requested()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of one step. Each name takes one value per step, and its steps must rise."""
        numbers = {self._checked(name, step): float(value) for name, value in values.items()}
        self.journal.append({"kind": "metrics", "step": int(step), "values": numbers})
        self._last |= dict.fromkeys(numbers, int(step))
        self._measurements.append({"kind": "step", "step": int(step), "time": time.time()})

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Record values that depend on the clock or the machine: MLflow shows them, and results never include them."""
        numbers = {name: float(value) for name, value in values.items()}
        self._measurements.append({"kind": "timings", "step": int(step), "time": time.time(), "values": numbers})

    def ready(self, device: str = "") -> None:
        """Mark the end of start-up (imports); the page of costs counts the time before it separately. `device` is shown in MLflow."""
        self._measurements.append(
            {"kind": "ready", "time": time.time()} | ({"device": device} if device else {}) | _energy()
        )

    def kernels(self, attention: str, head: str) -> None:
        """Note which attention and head the run computes with; they depend on the device, so they are no part of the result."""
        self._measurements.append({"kind": "kernels", "time": time.time(), "attention": attention, "head": head})

    def judged(self, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Note tokens that a judge's server counted for this run since the last call. They are paid, so a resumed run keeps them."""
        tokens = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        self._measurements.append({"kind": "judge", "time": time.time(), "model": model} | tokens)

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> Path:
        """Write rows to artifacts/{name}-{step}.json and return the path."""
        path = artifact_path(self.folder, f"{name}-{step:06d}.json")
        text = json.dumps(representable(redacted(rows)), indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        write_atomic(path, (text + "\n").encode())
        relative = path.relative_to(self.folder).as_posix()
        self.journal.append({"kind": "table", "name": name, "step": int(step), "path": relative, "rows": len(rows)})
        return path

    def file(self, name: str, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` make the file artifacts/{name} of one step, and record it. Only the process that records calls it."""
        if not self._context.records:
            return
        path = artifact_path(self.folder, name)
        write(path)
        relative = path.relative_to(self.folder).as_posix()
        self.journal.append({"kind": "artifact", "step": int(step), "path": relative})

    def faults(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        """Record the numerical faults of a step, with the ids of their rows, as a table."""
        self.table("faults", step, [dict(fault) for fault in found])

    def summary(self, values: Mapping[str, float]) -> None:
        """Record the run's results by name; `/` in a name makes groups in metrics.json."""
        numbers = {_named(name): _plain(value) for name, value in values.items()}
        self.journal.append({"kind": "summary", "values": numbers})

    def tag(self, key: str, value: object) -> None:
        """Record a tag of the run, shown in MLflow."""
        self.journal.append({"kind": "tags", "values": {_named(key): str(value)}})

    def last_step(self) -> int | None:
        """Return the last step that has metrics in the journal, or None."""
        return max(self._last.values(), default=None)

    def truncate_after(self, step: int) -> None:
        """Drop everything that was logged after the checkpoint of `step`; -1 keeps only the run's identity."""
        for record in self.journal.truncate_after(step):
            if record["kind"] == "table" or (record["kind"] == "artifact" and "step" in record):
                (self.folder / record["path"]).unlink(missing_ok=True)
        self._measurements.truncate_after(step)
        self._recall()

    def open(self, start: Record, params: Record, measured: Record) -> None:
        """Start a new journal, or continue the journal of a process that was cut off."""
        self.journal.recover()
        self._measurements.recover()
        records = self.journal.records()
        # a kill, or a full disk, between the first two records: nothing has begun, and the parameters are not recorded
        begun = any(record["kind"] == "params" for record in records)
        self.resumed = begun and ended(records) != "FINISHED"
        if records and not self.resumed:
            self._reset()
        if self.resumed:
            self.journal.append({"kind": "resume"})
            _drop_foreign_checkpoints(self._context)
            _drop_uncovered_checkpoints(self._context, _last_step(records))
            if not _has_files(self._context.checkpoints):
                self.truncate_after(-1)
        else:
            _drop_uncovered_checkpoints(self._context, -1)
            self.journal.append(start)
            self.journal.append(params)
        self._measurements.append(measured | {"time": time.time()} | _energy())
        self._recall()

    def close(self, status: str, reason: str | None = None) -> None:
        """Record the end of the run with its status."""
        self.journal.append({"kind": "end", "status": status} | ({"reason": reason} if reason else {}))
        self._measurements.append({"kind": "end", "time": time.time()} | _energy())

    def _checked(self, name: str, step: int) -> str:
        """Return the metric's name. Raises TrackingError if the journal already holds this step or a later one."""
        last = self._last.get(_named(name), -1)
        if step <= last:
            raise TrackingError(
                f"metric {name!r} at step {step}: the journal already holds step {last}. Steps must rise;"
                " after loading a checkpoint call truncate_after(its step) on the recorder first."
            )
        return name

    def _recall(self) -> None:
        """Read the last step of each metric from the journal."""
        metrics = (record for record in self.journal.records() if record["kind"] == "metrics")
        self._last = {name: record["step"] for record in metrics for name in record["values"]}

    def _reset(self) -> None:
        """Remove the records and files of an earlier, finished run."""
        self.journal.clear()
        self._measurements.clear()
        for folder in (ARTIFACTS, CHECKPOINTS, FAULTS):
            shutil.rmtree(self._context.state / folder, ignore_errors=True)


def _energy() -> Record:
    """Return the machine's energy counters as part of a measurement; nothing if it shows none."""
    counters = read_counters() | gpu_counters()
    return {"energy": counters} if counters else {}


def _drop_foreign_checkpoints(context: RunContext) -> None:
    """Remove checkpoints that other code wrote."""
    every = context.state / CHECKPOINTS
    foreign = [path for path in every.iterdir() if path != context.checkpoints] if every.is_dir() else []
    if foreign:
        print(
            f"{context.name}: the code has changed since the checkpoints were written, so they are removed and training starts again",
            file=sys.stderr,
        )
    for path in foreign:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _last_step(records: Sequence[Record]) -> int:
    """Return the last step with metrics, or -1."""
    return max((int(record["step"]) for record in records if record["kind"] == "metrics"), default=-1)


def _drop_uncovered_checkpoints(context: RunContext, last: int) -> None:
    """Remove checkpoints of steps that the journal does not hold: continuing from one would lose the records before it."""
    for path in sorted(context.checkpoints.glob("step-*")):
        if int(path.name.rpartition("-")[2]) > last:
            print(
                f"{context.name}: the journal ends before checkpoint {path.name}, so that checkpoint is removed",
                file=sys.stderr,
            )
            shutil.rmtree(path)


def _has_files(folder: Path) -> bool:
    """Return True if the folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def _named(name: str) -> str:
    """Return the name if it is valid. Raises TrackingError otherwise."""
    if not _NAME.fullmatch(name):
        raise TrackingError(
            f"{name!r}: the name of a metric or tag may hold only letters, digits and _ @ . / : -, e.g. 'heldout/accuracy'"
        )
    return name


def _plain(value: Any) -> Any:
    """Return a number of numpy or torch as a plain Python number."""
    return value.item() if hasattr(value, "item") else value
