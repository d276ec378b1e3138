"""Put preferences that people chose into the inbox, in the form of the project's own table."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from pipelines.config.params import load_params
from pipelines.data.sources import CANONICAL, FORM, table_rows
from pipelines.data.tables import SCORES
from posttrain.errors import DataError
from posttrain.files import write_atomic

Row = dict[str, Any]
FOLDER = "preferences"
TABLE = Path("data/tables/preferences.parquet")


def preference(prompt: Any, chosen: str, rejected: str, high: float = 1.0, low: float = 0.0) -> Row:
    """Return a pair with its scores from 0 to 1; answers to chat messages are messages."""
    answers: Row = {"chosen": chosen, "rejected": rejected}
    if not isinstance(prompt, str):
        answers = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": prompt, **answers, **dict(zip(SCORES, (high, low), strict=True)), FORM: CANONICAL}


def needs_scores(project: Path) -> bool:
    """Return True if the project's preferences have scores, so that a file without them would be refused."""
    table = project / TABLE
    if table.is_file():
        import pyarrow.parquet as pq

        return SCORES[0] in pq.read_schema(table).names
    rows = table_rows("preferences", load_params(project / "params.yaml").data)
    return bool(rows) and SCORES[0] in rows[0]


def put(inbox: str, name: str, rows: Iterable[Row], *, scores: bool, table: str = FOLDER) -> str:
    """Write one file into the inbox, for `table`, replacing one of this name, and return its place.

    Args:
        scores: keep the pairs' scores; without, they are left out.
    """
    kept = [row if scores else {key: value for key, value in row.items() if key not in SCORES} for row in rows]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode("utf-8")
    if _is_store(inbox):
        return _upload(inbox, f"{table}/{name}", data)
    path = Path(inbox.removeprefix("file://")).expanduser() / table / name
    write_atomic(path, data)
    return str(path)


def put_new(inbox: str, stem: str, rows: Iterable[Row], *, scores: bool) -> str:
    """Write one file of preferences into a folder, under the first free name, and return its place.

    Of two processes that choose a name at once, one would replace the file of the other: the folder is locked meanwhile.
    """
    refuse_store(inbox)
    folder = Path(inbox.removeprefix("file://")).expanduser() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return put(inbox, free_name(inbox, stem), rows, scores=scores)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; wait for it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refuse_store(inbox: str) -> None:
    """Raise DataError if the inbox is a store."""
    if _is_store(inbox):
        raise DataError(f"choices are written to a folder, and POSTTRAIN_INBOX is {inbox}; unset it for this command")


def free_name(inbox: str, stem: str) -> str:
    """Return the first of `stem-0001.jsonl`, `stem-0002.jsonl`, … that a folder does not have."""
    folder = Path(inbox.removeprefix("file://")).expanduser() / FOLDER
    return next(name for i in count(1) if not (folder / (name := f"{stem}-{i:04d}.jsonl")).exists())


def _is_store(inbox: str) -> bool:
    return "://" in inbox and not inbox.startswith("file://")


def _upload(inbox: str, place: str, data: bytes) -> str:
    import fsspec

    files, base = fsspec.core.url_to_fs(inbox)
    files.pipe_file(f"{base}/{place}", data)
    return f"{inbox.rstrip('/')}/{place}"
