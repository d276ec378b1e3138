"""Append-only log of a run in JSON lines, fsynced, without clock or host; MLflow is derived from it.

A crash may leave a partial last line: readers ignore it, and the next append removes it. Every line of a live journal ends with a
checksum of itself and of the line before it, so that a changed or lost line is noticed; older and published journals have none. JSON has
no NaN and no infinities; they are written as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime.redaction import redacted
from posttrain.errors import TrackingError
from posttrain.files import named_in_errors, write_atomic

Record = dict[str, Any]
_CHECKED = re.compile(rb'(.*), "check": "([0-9a-f]{16})"\}')
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
    """Return every complete line of a journal. A partial last line is skipped, and a missing file is an empty journal.

    Raises TrackingError if a line is damaged or lost.
    """
    records, damaged, _ = _scan(path)
    if damaged is None:
        return records
    if ".posttrain" in path.parts:
        advice = "Run its step again: it keeps the records before this line, and continues from a checkpoint that they cover."
    else:
        advice = f"`dvc checkout {path}` restores it from DVC's cache; without a cached copy, run its stage again."
    raise TrackingError(
        f"{path}, line {damaged}: not the record that was written: the file is damaged, so it is not used. {advice}"
    )


def _scan(path: Path) -> tuple[list[Record], int | None, bytes]:
    """Return the records before the first damaged line, the number of that line or None, and the last checksum."""
    data = path.read_bytes() if path.is_file() else b""
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    checked = any(map(_CHECKED.fullmatch, lines))
    records: list[Record] = []
    check = b""
    for number, line in enumerate(lines, start=1):
        match = _CHECKED.fullmatch(line)
        if match and match[2] == _check(check, match[1]):
            line, check = match[1] + b"}", match[2]
        elif checked:
            return records, number, check
        record = _decode(line)
        if record is None:
            return records, number, check
        records.append(record)
    return records, None, check


def _decode(line: bytes) -> Record | None:
    """Return the record of a line, or None if it is not one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def _check(previous: bytes, body: bytes) -> bytes:
    """Return the checksum of a line, which depends on all lines before it."""
    return hashlib.sha256(previous + body).hexdigest()[:16].encode()


class Journal:
    """Append records to one journal file. `durable=False` skips fsync, for values that may be lost."""

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
        self._check: bytes | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, and fsync it if the journal is durable. Raises TrackingError if the disk is full."""
        data, check = self._line(record, self._check)
        with named_in_errors(self.path):
            written = os.write(self._file, data)
        if written != len(data):
            raise TrackingError(
                f"{self.path}: only {written} of {len(data)} bytes were written; the disk may be full. Free space, then"
                " run the same command again."
            )
        if self._durable:
            with named_in_errors(self.path):
                os.fsync(self._file)
        self._check = check

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
            self._replace(kept)
        return dropped

    def recover(self) -> int | None:
        """Keep the records before the first damaged line, and a copy of the damaged file; return the number of that line, or None."""
        kept, damaged, _ = _scan(self.path)
        if damaged is not None:
            copy = self.path.with_name(f"{self.path.name}.damaged")
            write_atomic(copy, self.path.read_bytes())
            self._replace(kept)
            print(
                f"{self.path}: line {damaged} is damaged; the {len(kept)} records before it are kept, and the file as {copy.name}",
                file=sys.stderr,
            )
        return damaged

    def _replace(self, records: Iterable[Record]) -> None:
        """Replace the content of the file."""
        os.close(self._file)
        content: list[bytes] = []
        check: bytes | None = b"" if self._durable else None
        for record in records:
            line, check = self._line(record, check)
            content.append(line)
        write_atomic(self.path, b"".join(content))
        self._file = self._open()

    @staticmethod
    def _line(record: Mapping[str, Any], previous: bytes | None) -> tuple[bytes, bytes | None]:
        """Return a record's line and its checksum, both without one if `previous` is None."""
        line = encode(record).encode()
        if previous is None:
            return line, None
        body = line.removesuffix(b"}\n")
        check = _check(previous, body)
        return body + b', "check": "' + check + b'"}\n', check

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
        self._check = self._last_check()
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _last_check(self) -> bytes | None:
        """Return the checksum to continue from; None for a file without checksums, which an older version began."""
        if not self._durable:
            return None
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        match = _CHECKED.fullmatch(lines[-1]) if lines else None
        return (match[2] if match else None) if lines else b""


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
