"""Sources to canonical rows: a generator, a local file, or hub:OWNER/NAME, shaped as `TableSource` says; then accepted files.

Files that the inbox let in (pipelines.commands.intake) stand in data/raw/accepted/TABLE and follow the configured source, in the order
in which they came.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipelines.config.schema import DataParams, TableSource
from pipelines.data.column_mapping import canonical_rows
from pipelines.data.files import READERS, Record, read_file
from pipelines.data.tables import SCORES, TEXT, Row
from posttrain.environments import arithmetic, stories
from posttrain.environments.parts import Kind
from posttrain.errors import ConfigError, DataError
from posttrain.text import nearest

GENERATORS = ("arithmetic", "stories")
HUB = "hub:"
ACCEPTED = Path("data/raw/accepted")


def table_rows(kind: Kind, data: DataParams) -> list[Row]:
    """The rows of `data.{kind}` and of its accepted files, with canonical columns and `id`, their position.

    Raises ConfigError for a source that cannot be asked for, DataError for one that cannot be used.
    """
    rows = _configured_rows(kind, data)
    for path in accepted_files(kind):
        rows += alike(kind, rows, file_rows(kind, data, path), path)
    return numbered(rows)


def accepted_files(kind: Kind) -> list[Path]:
    """What the inbox let in for this table; names begin with a rising number."""
    found = [path for path in (ACCEPTED / kind).glob("*") if path.suffix.lower() in READERS]
    return sorted(found, key=lambda path: (arrival_number(path), path.name))


def arrival_number(path: Path) -> int:
    """The number that an accepted file's name begins with; 0 without one."""
    digits = re.match(r"\d+", path.name)
    return int(digits[0]) if digits else 0


def file_rows(kind: Kind, data: DataParams, path: Path) -> list[Row]:
    """Rows of one more file. It has the columns of a configured file or hub source, else the canonical ones."""
    source: TableSource = getattr(data, kind)
    update: dict[str, Any] = {"source": path.as_posix(), "rows": None}
    if source.source in GENERATORS:
        update |= {"columns": None, "extract": None, "graded": None}
    return canonical_rows(kind, source.model_copy(update=update), read_file(path))


def alike(kind: Kind, rows: list[Row], more: list[Row], path: Path) -> list[Row]:
    """`more`, which must be text where the table has text, messages where it has messages, and graded if it is graded.

    Raises DataError where they cannot stand in one table.
    """
    for name in TEXT[kind]:
        mine, theirs = _form(more[0][name]), _form(rows[0][name])
        if mine != theirs:
            raise DataError(f"{path.name}: {name} is {mine}, and the table {kind} holds {theirs}; make them the same")
    for name in SCORES:
        if (name in rows[0]) != (name in more[0]):
            said = f"has no {name}, which" if name in rows[0] else f"has {name}, which none of"
            raise DataError(f"{path.name}: {said} the rows of the table {kind} have; make them the same")
    return more


def numbered(rows: list[Row]) -> list[Row]:
    return [{**row, "id": i} for i, row in enumerate(rows)]


def _form(value: Any) -> str:
    return "chat messages" if isinstance(value, list) else "plain text"


def _configured_rows(kind: Kind, data: DataParams) -> list[Row]:
    source: TableSource = getattr(data, kind)
    if source.source in GENERATORS:
        rows = _generated(kind, source, data)
        return [{"id": i, **row} for i, row in enumerate(rows)]
    if source.graded and kind != "preferences":
        raise ConfigError(f"data.{kind}.graded: only data.preferences makes pairs out of graded answers; remove it")
    return canonical_rows(kind, source, _records(kind, source))


def local_file(source: str) -> Path | None:
    """The file that a source names, or None for a generator or a hub id."""
    return Path(source) if Path(source).suffix.lower() in READERS and not source.startswith(HUB) else None


def _generated(kind: Kind, source: TableSource, data: DataParams) -> list[Row]:
    for field in ("columns", "extract", "graded"):
        if getattr(source, field) is not None:
            raise ConfigError(f"data.{kind}.{field}: has no effect on the generator {source.source!r}. Remove it.")
    if source.rows is None:
        raise ConfigError(
            f"data.{kind}.rows: missing; a generator needs to know how many rows to make, e.g. rows: 1000"
        )
    if source.source == "arithmetic":
        task = data.arithmetic
        return arithmetic.rows(
            kind, source.rows, data.seed, terms=task.terms, max_term=task.max_term, careless=task.careless
        )
    if data.stories is None:
        raise ConfigError("data.stories: missing; the generator stories needs {words: [...], openings: [...]}")
    told = data.stories
    return stories.rows(kind, source.rows, data.seed, words=told.words, openings=told.openings, careless=told.careless)


def _records(kind: Kind, source: TableSource) -> list[Record]:
    if source.source.startswith(HUB):
        return _hub(kind, source)
    path = local_file(source.source)
    if path is None:
        raise ConfigError(
            f"data.{kind}.source = {source.source!r}: no such generator{nearest(source.source, GENERATORS)};"
            f" or a file ({', '.join(READERS)}), or hub:OWNER/NAME"
        )
    return read_file(path)


def _hub(kind: Kind, source: TableSource) -> list[Record]:
    """hub:OWNER/NAME[:CONFIGURATION][@REVISION]"""
    name, _, revision = source.source.removeprefix(HUB).partition("@")
    name, _, configuration = name.partition(":")
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(name, configuration or None, split=source.split, revision=revision or None)
    except Exception as error:
        raise DataError(
            f"data.{kind}.source = {source.source!r}: cannot load split {source.split!r}: {type(error).__name__}: {error}."
            " Steps run offline by default: set HF_HUB_OFFLINE=0 to download, and check the id and data.*.split."
        ) from error
    records: list[Record] = loaded.to_list()
    return records
