"""Record one run of one step: metrics, tables, artifacts and its state on disk.

Live files are in `state`, which is untracked and survives a kill. A finished run is published into `directory`, which DVC tracks.
Values that depend on the clock go only to the measurements, never to the journal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.config.params import Params
from pipelines.runtime.identity import file_digest
from pipelines.runtime.journal import Journal, Record, ended, representable, write_atomic
from pipelines.runtime.publish import ARTIFACTS, JOURNAL
from pipelines.runtime.redaction import redacted
from posttrain.errors import TrackingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASUREMENTS, CHECKPOINTS, FAULTS, LOCK = "measurements.jsonl", "checkpoints", "faults", "lock"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@./:-]*")


class Run:
    """Parameters, paths and recorder of one step. Each recording method appends to the journal before it returns."""

    def __init__(
        self,
        *,
        stage: str,
        name: str,
        params: Params,
        args: argparse.Namespace,
        directory: Path,
        state: Path,
        key: str,
        code: str,
        stop_requested: Callable[[], bool] = lambda: False,
        records: bool = True,
    ) -> None:
        self.stage = stage
        self.name = name
        self.params = params
        self.args = args
        self.directory = directory
        self.state = state
        self.key = key
        self.code = code
        """Digest of the code; a checkpoint that different code wrote is never continued."""
        self.stop_requested = stop_requested
        """Return True if a signal asked to stop. Then write a checkpoint and raise Interrupted."""
        self.resumed = False
        """True if an earlier process of this run was cut off and this process continues its journal."""
        self.records = records
        """True for the one process that records; the records of the other ranks are discarded."""
        self._nowhere = None if records else TemporaryDirectory(prefix="posttrain-")
        self._written = Path(self._nowhere.name) if self._nowhere else state
        self._journal = Journal(self._written / JOURNAL)
        self._measurements = Journal(self._written / MEASUREMENTS, durable=False)
        self._last: dict[str, int] = {}

    @property
    def identity(self) -> str:
        """Return `name-key`: the folder of the run's state, and its tag in MLflow."""
        return self.state.name

    @property
    def command(self) -> str:
        """Return the command that runs only this step."""
        given = {name: value for name, value in sorted(vars(self.args).items()) if name not in ("params", "replay")}
        options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
        return " ".join([f"python -m pipelines.{self.stage}", *options])

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints that this code wrote. It is removed when the step has succeeded."""
        return self.state / CHECKPOINTS / self.code[:16]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of one step. Each name takes one value per step, and its steps must rise."""
        numbers = {self._checked(name, step): float(value) for name, value in values.items()}
        self._journal.append({"kind": "metrics", "step": int(step), "values": numbers})
        self._last |= dict.fromkeys(numbers, int(step))
        self._measurements.append({"kind": "step", "step": int(step), "time": time.time()})

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Record values that depend on the clock or the machine: MLflow shows them, and results never include them."""
        numbers = {name: float(value) for name, value in values.items()}
        self._measurements.append({"kind": "timings", "step": int(step), "time": time.time(), "values": numbers})

    def ready(self) -> None:
        """Mark the end of start-up (imports, loading); the page of costs counts the time before it separately."""
        self._measurements.append({"kind": "ready", "time": time.time()})

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> Path:
        """Write rows to artifacts/{name}-{step}.json and return the path."""
        path = self._artifact_path(f"{name}-{step:06d}.json")
        text = json.dumps(representable(redacted(rows)), indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        write_atomic(path, (text + "\n").encode())
        self._journal.append(
            {"kind": "table", "name": name, "step": int(step), "path": self._relative(path), "rows": len(rows)}
        )
        return path

    def faults(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        """Record the numerical faults of a step, with the ids of their rows, as a table."""
        self.table("faults", step, [dict(fault) for fault in found])

    def figure(self, name: str, figure: Figure) -> Path:
        """Write a matplotlib figure to artifacts/{name}.png, without library version and date in its metadata."""
        path = self.artifact(f"{name}.png")
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
        return path

    def artifact(self, name: str) -> Path:
        """Record an artifact and return its path under artifacts/; the step must write it before it ends."""
        path = self._artifact_path(name)
        self._journal.append({"kind": "artifact", "path": self._relative(path)})
        return path

    def summary(self, values: Mapping[str, float]) -> None:
        """Record the run's results by name; `/` in a name makes groups in metrics.json."""
        numbers = {_named(name): _plain(value) for name, value in values.items()}
        self._journal.append({"kind": "summary", "values": numbers})

    def model(self, path: str | Path) -> None:
        """Record a written model folder by its path and the sha256 of its weights; DVC stores the bytes."""
        folder = Path(path)
        files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
        if not any(file.suffix == ".safetensors" for file in files):
            raise TrackingError(
                f"{folder}: holds no .safetensors file, so there are no weights to record. Save the model there first."
            )
        weights = {file.name: file_digest(file) for file in files}
        digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        self._journal.append({"kind": "model", "path": folder.as_posix(), "files": weights, "sha256": digest})

    def tag(self, key: str, value: object) -> None:
        """Record a tag of the run, shown in MLflow."""
        self._journal.append({"kind": "tags", "values": {_named(key): str(value)}})

    def truncate_after(self, step: int) -> None:
        """Drop everything that was logged after the checkpoint of `step`; -1 keeps only the run's identity."""
        for record in self._journal.truncate_after(step):
            if record["kind"] == "table":
                (self._written / record["path"]).unlink(missing_ok=True)
        self._measurements.truncate_after(step)
        self._recall()

    def open(self, start: Record, params: Record, measured: Record) -> None:
        """Start a new journal, or continue the journal of a process that was cut off."""
        records = self._journal.records()
        self.resumed = bool(records) and ended(records) != "FINISHED"
        if records and not self.resumed:
            self._reset()
        if self.resumed:
            self._journal.append({"kind": "resume"})
            self._drop_foreign_checkpoints()
            if not _has_files(self.checkpoints):
                self.truncate_after(-1)
        else:
            self._journal.append(start)
            self._journal.append(params)
        self._measurements.append(measured | {"time": time.time()})
        self._recall()

    def _drop_foreign_checkpoints(self) -> None:
        """Remove checkpoints that other code wrote."""
        every = self.state / CHECKPOINTS
        foreign = [path for path in every.iterdir() if path != self.checkpoints] if every.is_dir() else []
        if foreign:
            print(
                f"{self.name}: the code has changed since the checkpoints were written, so they are removed and training starts again",
                file=sys.stderr,
            )
        for path in foreign:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self, status: str, reason: str | None = None) -> None:
        """Record the end of the run with its status."""
        self._journal.append({"kind": "end", "status": status} | ({"reason": reason} if reason else {}))
        self._measurements.append({"kind": "end", "time": time.time()})

    def last_step(self) -> int | None:
        """Return the last step that has metrics in the journal, or None."""
        return max(self._last.values(), default=None)

    def _checked(self, name: str, step: int) -> str:
        """Return the metric's name. Raises TrackingError if the journal already holds this step or a later one."""
        last = self._last.get(_named(name), -1)
        if step <= last:
            raise TrackingError(
                f"metric {name!r} at step {step}: the journal already holds step {last}. Steps must rise;"
                " after loading a checkpoint call run.truncate_after(its step) first."
            )
        return name

    def _artifact_path(self, name: str) -> Path:
        """Return the path of an artifact. Raises TrackingError if the name leaves artifacts/."""
        path = self._written / ARTIFACTS / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise TrackingError(f"artifact {name!r}: must be a name inside artifacts/, without '..'")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._written).as_posix()

    def _recall(self) -> None:
        """Read the last step of each metric from the journal."""
        metrics = (record for record in self._journal.records() if record["kind"] == "metrics")
        self._last = {name: record["step"] for record in metrics for name in record["values"]}

    def _reset(self) -> None:
        """Remove the records and files of an earlier, finished run."""
        self._journal.clear()
        self._measurements.clear()
        for folder in (ARTIFACTS, CHECKPOINTS, FAULTS):
            shutil.rmtree(self.state / folder, ignore_errors=True)


def _has_files(folder: Path) -> bool:
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
