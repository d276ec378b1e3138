"""Copy a finished run's files into the directory tracked by DVC. The same run gives the same bytes."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime.journal import Record, canonical, encode, number, read, representable
from posttrain.errors import TrackingError
from posttrain.files import write_atomic

SHARED_REPORT = Path(".posttrain") / "report.html"
"""The report with this machine's times in it, as one file; it is not part of any result."""
JOURNAL, METRICS, CURVES, ARTIFACTS = "journal.jsonl", "metrics.json", "curves.csv", "artifacts"


def publish(state: Path, directory: Path, end: Record) -> None:
    """Write the journal, metrics, curves and recorded artifacts of a finished run into its run directory."""
    records = canonical([*read(state / JOURNAL), end])
    directory.mkdir(parents=True, exist_ok=True)
    _remove(directory)
    (directory / ARTIFACTS).mkdir()
    for record in records:
        if record["kind"] in ("table", "artifact"):
            _copy(state / record["path"], directory / record["path"])
    curves = _curves(records)
    if curves:
        write_atomic(directory / CURVES, curves.encode())
    summary: Record = next((r["values"] for r in records if r["kind"] == "summary"), {})
    write_atomic(directory / METRICS, _json(nested(summary)))
    write_atomic(directory / JOURNAL, "".join(map(encode, records)).encode())


def _remove(directory: Path) -> None:
    """Unlink the old files; overwriting could write through a link into the DVC cache."""
    for name in (JOURNAL, METRICS, CURVES):
        (directory / name).unlink(missing_ok=True)
        for left in directory.glob(f".{name}.*"):
            # A process that was killed while publishing left this file; a later stage would count it as an input.
            left.unlink()
    if (directory / ARTIFACTS).is_dir():
        shutil.rmtree(directory / ARTIFACTS)


def _copy(source: Path, target: Path) -> None:
    """Copy one recorded artifact. Raises TrackingError if the step has not written it."""
    if not source.exists():
        raise TrackingError(
            f"{source}: recorded as an artifact, but the file does not exist, so the run cannot be published. Write it"
            " before the step ends."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"heldout/accuracy": .9} as {"heldout": {"accuracy": .9}}, sorted by name."""
    tree: dict[str, Any] = {}
    for name, value in sorted(flat.items()):
        *parents, leaf = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise TrackingError(
                    f"summary {name!r}: {part!r} is already a number and cannot be a group as well; rename one of them."
                )
        node[leaf] = value
    return tree


def _curves(records: list[Record]) -> str:
    """Return the metrics as CSV: one row per step, one column per metric, empty if a step has no value."""
    rows = [(record["step"], record["values"]) for record in records if record["kind"] == "metrics"]
    names = sorted({name for _, values in rows for name in values})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["step", *names])
    for step, values in rows:
        writer.writerow([step, *(repr(number(values[name])) if name in values else "" for name in names)])
    return out.getvalue() if rows else ""


def _json(tree: Any) -> bytes:
    """Return the tree as indented JSON with sorted keys."""
    return (json.dumps(representable(tree), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
