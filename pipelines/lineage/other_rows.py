"""Find the rows of the tables that are not of a forgotten file, and keep them until the tables are made again.

A text that other rows have too is no copy of the file's row. `posttrain forget` deletes tables with the file's rows. Without the other
rows of those tables, forgetting a second file before the tables are made again would delete every file with a shared text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.lineage.objects import Objects
from pipelines.lineage.quotes import Texts, strings
from pipelines.tracking.lockfile import locked_output
from posttrain.errors import DataError
from posttrain.files import write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = "data/tables"
REMAINING = Path(".posttrain/remaining")
"""Tables that `posttrain forget` deleted, without the forgotten rows."""


def read_tables(project: Path, stored: Objects) -> dict[str, pa.Table]:
    """Return the tables of ingest by file name, which a fresh clone lacks, and a project after `posttrain forget`.

    Of each, it is the file in data/tables, else its remaining rows after an earlier `forget`, else the version in dvc.lock. Lost ones
    are left out.
    """
    entry = locked_output(project, TABLES) or {}
    locked = stored.entries(str(entry["md5"])) if "md5" in entry else {}
    folders = (project / TABLES, project / REMAINING)
    names = {path.name for folder in folders for path in folder.glob("*.parquet")}
    names |= {name for name in locked if name.endswith(".parquet")}
    found = {}
    for name in sorted(names):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        data = path.read_bytes() if path is not None else stored.read(locked[name])
        if data is not None:
            found[name] = _table(name, data)
    return found


def other_rows(tables: Iterable[pa.Table], mine: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of tables that are not of the file with the records `mine`."""
    own = [set(strings(record)) for record in mine]
    rows = (row for table in tables for row in table.to_pylist())
    return [row for row in rows if not any(set(strings(row)) <= each for each in own)]


def keep_other_rows(project: Path, tables: dict[str, pa.Table], texts: Texts) -> None:
    """Keep the rows without the texts of every table that data/tables no longer has, and drop the kept rows of those that it has."""
    for path in (project / REMAINING).glob("*.parquet"):
        path.unlink()
    for name, table in tables.items():
        if not (project / TABLES / name).is_file():
            write_atomic(project / REMAINING / name, _without(table, texts))


def _without(table: pa.Table, texts: Texts) -> bytes:
    """Return a table as Parquet without the rows that hold one of the texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = table.filter(pa.array([not texts.in_row(row) for row in table.to_pylist()], pa.bool_()))
    sink = pa.BufferOutputStream()
    pq.write_table(kept, sink)
    return bytes(sink.getvalue())


def _table(name: str, data: bytes) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq  # its ParquetFile: read_table imports pandas

    try:
        return pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{TABLES}/{name} is damaged ({error}), so the rows of other files are unknown. Type `dvc checkout --force {TABLES}`,"
            " then this again."
        ) from None
