"""One run of one step: where it writes what it measured.

Live files are in `state`, which is untracked and survives a kill; a finished run is published into `directory`, which
DVC keeps. Numbers that depend on the clock go to the measurements only, never to the journal.
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
    """What a step is given. `metrics`, `table`, `summary` … are appended to the journal before they return."""

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
        """Digest of what computes; checkpoints of other code are never continued."""
        self.stop_requested = stop_requested
        """Whether a signal asked to stop: write a checkpoint, then raise Interrupted."""
        self.resumed = False
        """Whether an earlier process of the same run was cut off and this one continues its journal."""
        self.records = records
        """Of several processes that do a step together one records; what the others say goes nowhere."""
        self._nowhere = None if records else TemporaryDirectory(prefix="posttrain-")
        self._written = Path(self._nowhere.name) if self._nowhere else state
        self._journal = Journal(self._written / JOURNAL)
        self._measurements = Journal(self._written / MEASUREMENTS, durable=False)
        self._last: dict[str, int] = {}

    @property
    def identity(self) -> str:
        """`name-key`: the folder of the run's state, and its tag in MLflow."""
        return self.state.name

    @property
    def command(self) -> str:
        """What runs this step alone."""
        given = {name: value for name, value in sorted(vars(self.args).items()) if name not in ("params", "replay")}
        options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
        return " ".join([f"python -m pipelines.{self.stage}", *options])

    @property
    def checkpoints(self) -> Path:
        """Where the training loop keeps its checkpoints: those of this code. Removed when the step has succeeded."""
        return self.state / CHECKPOINTS / self.code[:16]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of one step. A name takes one value per step, in rising order."""
        numbers = {self._checked(name, step): float(value) for name, value in values.items()}
        self._journal.append({"kind": "metrics", "step": int(step), "values": numbers})
        self._last |= dict.fromkeys(numbers, int(step))
        self._measurements.append({"kind": "step", "step": int(step), "time": time.time()})

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that depend on the clock or the machine: shown in MLflow, never part of a result."""
        numbers = {name: float(value) for name, value in values.items()}
        self._measurements.append({"kind": "timings", "step": int(step), "time": time.time(), "values": numbers})

    def ready(self) -> None:
        """Everything is imported, the work begins: what came before counts as start-up on the page of costs."""
        self._measurements.append({"kind": "ready", "time": time.time()})

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> Path:
        """Rows as artifacts/{name}-{step}.json."""
        path = self._artifact_path(f"{name}-{step:06d}.json")
        text = json.dumps(representable(redacted(rows)), indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        write_atomic(path, (text + "\n").encode())
        self._journal.append(
            {"kind": "table", "name": name, "step": int(step), "path": self._relative(path), "rows": len(rows)}
        )
        return path

    def faults(self, step: int, told: Sequence[Mapping[str, Any]]) -> None:
        """Numerical faults of a step, with the ids of their rows, as a table."""
        self.table("faults", step, [dict(fault) for fault in told])

    def figure(self, name: str, figure: Figure) -> Path:
        """A matplotlib figure as artifacts/{name}.png, without the library's version or the date in it."""
        path = self.artifact(f"{name}.png")
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
        return path

    def artifact(self, name: str) -> Path:
        """A path under artifacts/ to write before the step ends; recorded in the journal."""
        path = self._artifact_path(name)
        self._journal.append({"kind": "artifact", "path": self._relative(path)})
        return path

    def summary(self, values: Mapping[str, float]) -> None:
        """The run's results by name; `/` makes groups in metrics.json."""
        numbers = {_named(name): _plain(value) for name, value in values.items()}
        self._journal.append({"kind": "summary", "values": numbers})

    def model(self, path: str | Path) -> None:
        """Record a written model folder by path and by sha256 of its weights; the bytes stay with DVC."""
        folder = Path(path)
        files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
        if not any(file.suffix == ".safetensors" for file in files):
            raise TrackingError(f"{folder} holds no .safetensors file; save the model there before recording it.")
        weights = {file.name: file_digest(file) for file in files}
        digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
        self._journal.append({"kind": "model", "path": folder.as_posix(), "files": weights, "sha256": digest})

    def tag(self, key: str, value: object) -> None:
        self._journal.append({"kind": "tags", "values": {_named(key): str(value)}})

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after the checkpoint of `step`; -1 forgets everything but the run's identity."""
        for record in self._journal.truncate_after(step):
            if record["kind"] == "table":
                (self._written / record["path"]).unlink(missing_ok=True)
        self._measurements.truncate_after(step)
        self._recall()

    def open(self, start: Record, params: Record, measured: Record) -> None:
        """Begin a new journal, or continue the one of a process that was cut off."""
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
        every = self.state / CHECKPOINTS
        foreign = [path for path in every.iterdir() if path != self.checkpoints] if every.is_dir() else []
        if foreign:
            print(
                f"{self.name}: the code has changed since its checkpoints were written; they are dropped",
                file=sys.stderr,
            )
        for path in foreign:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self, status: str, reason: str | None = None) -> None:
        self._journal.append({"kind": "end", "status": status} | ({"reason": reason} if reason else {}))
        self._measurements.append({"kind": "end", "time": time.time()})

    def last_step(self) -> int | None:
        """The last step that has metrics in the journal."""
        return max(self._last.values(), default=None)

    def _checked(self, name: str, step: int) -> str:
        last = self._last.get(_named(name), -1)
        if step <= last:
            raise TrackingError(
                f"metric {name!r} at step {step}: the journal already holds step {last}. Steps must rise;"
                " after loading a checkpoint call run.truncate_after(its step) first."
            )
        return name

    def _artifact_path(self, name: str) -> Path:
        path = self._written / ARTIFACTS / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise TrackingError(f"artifact {name!r}: must be a name inside artifacts/, without '..'")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._written).as_posix()

    def _recall(self) -> None:
        metrics = (record for record in self._journal.records() if record["kind"] == "metrics")
        self._last = {name: record["step"] for record in metrics for name in record["values"]}

    def _reset(self) -> None:
        self._journal.clear()
        self._measurements.clear()
        for folder in (ARTIFACTS, CHECKPOINTS, FAULTS):
            shutil.rmtree(self.state / folder, ignore_errors=True)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise TrackingError(
            f"{name!r}: a metric or tag is named with letters, digits and _ @ . / : - only, e.g. 'heldout/accuracy'"
        )
    return name


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own."""
    return value.item() if hasattr(value, "item") else value
