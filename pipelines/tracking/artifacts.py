"""Upload tables, figures and the journal as MLflow artifacts. A file is sent once, and again only if its size has changed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines.runtime.journal import RUNNING
from pipelines.runtime.publish import ARTIFACTS, JOURNAL
from pipelines.tracking.source import RecordedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

LARGEST_BYTES = 64 * 2**20
"""Larger files are not uploaded; DVC keeps them."""
TRACEBACK = f"{ARTIFACTS}/traceback.txt"


def send_artifacts(client: MlflowClient, run_id: str, source: RecordedRun, sent: set[str]) -> None:
    """Upload everything that is not in `sent`, and add the names to it."""
    pending = dict(_contents(source, sent))
    if not pending:
        return
    present = _present(client, run_id, sorted({str(PurePosixPath(name).parent) for name in pending}))
    for name, data in pending.items():
        if present.get(name) != len(data):
            _upload(client, run_id, name, data)
        sent.add(name)


def _contents(source: RecordedRun, sent: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the files to send: tables as soon as the journal names them, other files and the journal after the run has ended."""
    for record in source.of("table"):
        if record["path"] not in sent and (source.folder / record["path"]).is_file():
            yield record["path"], split_table((source.folder / record["path"]).read_bytes())
    if source.status == RUNNING:
        return
    for path in [record["path"] for record in source.of("artifact")] + [TRACEBACK]:
        top = source.folder / path
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            name = file.relative_to(source.folder).as_posix()
            if name not in sent and file.is_file() and file.stat().st_size <= LARGEST_BYTES:
                yield name, file.read_bytes()
    yield JOURNAL, source.journal


def split_table(data: bytes) -> bytes:
    """Return the rows in the format of `mlflow.log_table`, which MLflow's UI shows as a table."""
    rows: list[dict[str, Any]] = json.loads(data)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
    return json.dumps(table, ensure_ascii=False).encode()


def _present(client: MlflowClient, run_id: str, parents: list[str]) -> dict[str, int | None]:
    """Return the size of each artifact that is already stored."""
    listed = (info for parent in parents for info in client.list_artifacts(run_id, None if parent == "." else parent))
    return {info.path: info.file_size for info in listed if not info.is_dir}


def _upload(client: MlflowClient, run_id: str, name: str, data: bytes) -> None:
    """Upload one artifact."""
    target = PurePosixPath(name)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, target.name)
        local.write_bytes(data)
        client.log_artifact(run_id, str(local), None if str(target.parent) == "." else str(target.parent))
