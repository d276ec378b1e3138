"""Append-only log of a run in JSON lines, fsynced, without clock or host; MLflow is derived from it.

A crash may leave a partial last line: readers ignore it, and the next append removes it. JSON has no NaN and no infinities; they are
written as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime.redaction import redacted
from posttrain.errors import TrackingError
from posttrain.files import write_atomic

Record = dict[str, Any]
FINISHED, FAILED, KILLED, RUNNING = "FINISHED", "FAILED", "KILLED", "RUNNING"


def representable(tree: Any) -> Any:
    """Return the tree with NaN and infinities as strings, so that it is valid JSON."""
    if isinstance(tree, float) and not math.isfinite(tree):
        return "NaN" if math.isnan(tree) else ("Infinity" if tree > 0 else "-Infinity")
    if isinstance(tree, Mapping):
        return {str(key): representable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [representable(value) for value in tree]
    return tree


def number(value: float | str) -> float:
    """Return a metric value as a float; undoes `representable`."""
    return float(value)


def encode(record: Mapping[str, Any]) -> str:
    """Return the record as one line of valid JSON, with sorted keys and without secrets."""
    return json.dumps(representable(redacted(record)), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> list[Record]:
    """Return every complete line of a journal. A partial last line is skipped, and a missing file is an empty journal."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return [_decode(path, index, line) for index, line in enumerate(lines, start=1)]


def _decode(path: Path, index: int, line: bytes) -> Record:
    """Parse one line of the journal. Raises TrackingError if it is not a record."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise TrackingError(
            f"{path}, line {index}: not a journal record: the file is damaged, and its run cannot be continued. Remove"
            " it, then run its step again."
        )
    return record


class Journal:
    """Append records to one journal file. `durable=False` skips fsync, for values that may be lost."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, and fsync it if the journal is durable. Raises TrackingError if the disk is full."""
        data = encode(record).encode()
        written = os.write(self._file, data)
        if written != len(data):
            raise TrackingError(
                f"{self.path}: only {written} of {len(data)} bytes were written; the disk may be full. Free space, then"
                " run the same command again."
            )
        if self._durable:
            os.fsync(self._file)

    def records(self) -> list[Record]:
        """Return every complete record of the file."""
        return read(self.path)

    def truncate_after(self, step: int) -> list[Record]:
        """Keep only the records that existed at the checkpoint of `step`, and return the dropped ones."""
        kept: list[Record] = []
        dropped: list[Record] = []
        for record in self.records():
            if "step" in record:
                beyond = record["step"] > step
            else:
                beyond = record["kind"] in ("summary", "model") or (step < 0 and record["kind"] in ("tags", "artifact"))
            (dropped if beyond else kept).append(record)
        if dropped:
            os.close(self._file)
            write_atomic(self.path, "".join(map(encode, kept)).encode())
            self._file = self._open()
        return dropped

    def clear(self) -> None:
        """Start again with an empty file."""
        os.close(self._file)
        write_atomic(self.path, b"")
        self._file = self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _open(self) -> int:
        """Open the file for appending, after removing a partial last line."""
        if self.path.is_file():
            data = self.path.read_bytes()
            if not data.endswith(b"\n") and data:
                os.truncate(self.path, data.rfind(b"\n") + 1)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def ended(records: Iterable[Record]) -> str | None:
    """Return the status that a run ended with, or None if it was cut off or has been resumed since."""
    status = None
    for record in records:
        if record["kind"] == "end":
            status = str(record["status"])
        elif record["kind"] in ("start", "resume"):
            status = None
    return status


def canonical(records: Iterable[Record]) -> list[Record]:
    """Return the journal as an undisturbed run writes it: kills, failures and resumes leave no trace."""
    start: list[Record] = []
    params: list[Record] = []
    tags: Record = {}
    metrics: dict[int, Record] = {}
    tables: dict[tuple[int, str], Record] = {}
    named: dict[tuple[str, str], Record] = {}
    summary: Record = {}
    end: list[Record] = []
    for record in records:
        match record["kind"]:
            case "start":
                start = [record]
            case "params":
                params = [record]
            case "tags":
                tags |= record["values"]
            case "metrics":
                metrics.setdefault(record["step"], {}).update(record["values"])
            case "table":
                tables[record["step"], record["name"]] = record
            case "artifact" | "model":
                named[record["kind"], record["path"]] = record
            case "summary":
                summary |= record["values"]
            case "end":
                end = [record]
    return [
        *start,
        *params,
        *([{"kind": "tags", "values": tags}] if tags else []),
        *({"kind": "metrics", "step": step, "values": values} for step, values in sorted(metrics.items())),
        *(record for _, record in sorted(tables.items())),
        *(record for _, record in sorted(named.items())),
        *([{"kind": "summary", "values": summary}] if summary else []),
        *end,
    ]
