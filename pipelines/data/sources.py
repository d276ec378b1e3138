"""Load a table's rows from a generator, a local file or hub:OWNER/NAME, as `TableSource` describes; then add the accepted files.

Intake (pipelines.commands.intake) stores accepted files in data/raw/accepted/TABLE. They follow the configured source in the order of
their arrival.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.config.data_schema import DataParams, TableSource
from pipelines.config.own_code import own_files
from pipelines.data.column_mapping import canonical_rows, generated_rows
from pipelines.data.conversation_rows import Sourced
from pipelines.data.file_columns import require_alike
from pipelines.data.files import READERS, Record, is_readable, read_file
from pipelines.data.pairs import Changes
from pipelines.data.parquet import table_records
from pipelines.data.splits import folder_files, pattern_files, refuse_twice, unread_files
from pipelines.data.tables import SCORES, TEXT, Row
from posttrain.environments.base import built_in, checked_rows, environment, is_environment
from posttrain.errors import ConfigError, DataError
from posttrain.files import files_below
from posttrain.text import nearest

HUB = "hub:"
ACCEPTED = Path("data/raw/accepted")
FORM, CANONICAL = "form", "canonical"
"""Field and value by which records say that their columns are the canonical ones."""


def table_rows(kind: Sourced, data: DataParams, changes: Changes | None = None) -> list[Row]:
    """Return the rows of `data.{kind}` and of its accepted files, with canonical columns and their position as `id`.

    Raises ConfigError if the source is not valid, DataError if it cannot be read.
    """
    rows = configured_rows(kind, data, changes)
    for path in accepted_files(kind):
        rows += alike(kind, rows, file_rows(kind, data, path, changes), path)
    return numbered(rows)


def accepted_files(kind: Sourced) -> list[Path]:
    """Return the accepted files of this table, sorted by the number at the start of their names; hidden files are none.

    Raises DataError for a file with an ending that no reader knows: its rows would be passed over.
    """
    found = [path for path in files_below(ACCEPTED / kind) if path.parent.name == kind and path.name[0] != "."]
    unread = next((path for path in found if not is_readable(path)), None)
    if unread is not None:
        raise DataError(
            f"{unread}: no reader knows the ending {unread.suffix or 'of this name'!r}, so its rows would be passed over. Give it that of"
            f" its content ({', '.join(READERS)}; then .gz, .bz2, .xz or .zst), or move it away; then type `dvc add {ACCEPTED}`."
        )
    return sorted(found, key=lambda path: (arrival_number(path), path.name))


def arrival_number(path: Path) -> int:
    """Return the number that an accepted file's name begins with; 0 without one."""
    digits = re.match(r"\d+", path.name)
    return int(digits[0]) if digits else 0


def file_rows(kind: Sourced, data: DataParams, path: Path, changes: Changes | None = None) -> list[Row]:
    """Return the rows of one additional file. It has the columns of a configured file or hub source, else the canonical ones.

    Files that this project writes into the inbox have the canonical columns whatever is configured, and say so in each record.
    """
    records = read_file(path)
    source: TableSource = getattr(data, kind)
    update: dict[str, Any] = {"source": path.as_posix(), "rows": None}
    if is_generator(source.source) or all(record.get(FORM) == CANONICAL for record in records):
        update |= {"columns": None, "extract": None, "graded": None, "preferred": None}
    return canonical_rows(kind, source.model_copy(update=update), records, changes, consume=True)


def alike(kind: Sourced, rows: Sequence[Row], more: list[Row], path: Path) -> list[Row]:
    """Return `more` if its rows have the form of the table: text or messages, and with or without scores.

    Raises DataError if they do not fit into one table.
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
    """Set each row's `id` to its position, and return the rows."""
    for i, row in enumerate(rows):
        row["id"] = i
    return rows


def _form(value: Any) -> str:
    """Return the form of a text value, in words."""
    return "chat messages" if isinstance(value, list) else "plain text"


def configured_rows(kind: Sourced, data: DataParams, changes: Changes | None) -> list[Row]:
    """Return the rows of the source that params.yaml configures."""
    source: TableSource = getattr(data, kind)
    if is_generator(source.source):
        made = _generated(kind, source, data)
        return generated_rows(kind, made, source, f"data.{kind}", Counter() if changes is None else changes)
    if source.preferred and kind != "preferences":
        raise ConfigError(f"data.{kind}.preferred: only data.preferences makes pairs out of two answers; remove it")
    if source.graded and kind != "preferences":
        raise ConfigError(f"data.{kind}.graded: only data.preferences makes pairs out of graded answers; remove it")
    if changes is not None and (left := unread(source)):
        changes[f"files of other splits than {source.wanted_split!r}, not read: {', '.join(left)}"] += len(left)
    return canonical_rows(kind, source, _records(kind, source), changes, consume=True)


def unread(source: TableSource) -> list[str]:
    """Return the data files of folders and patterns that a source names which are not of its split, and so are not read."""
    left: list[Path] = []
    for name in source.names:
        if name.startswith(HUB) or is_generator(name):
            continue
        if _exists(name):
            left += unread_files(Path(name), source.wanted_split) if Path(name).is_dir() else []
        elif _is_pattern(name):
            left += sorted({*_matches(name)} - {*_files_of(name, source)})
    return [path.as_posix() for path in left]


def is_generator(name: str | list[str]) -> bool:
    """Return True if a source is an environment, built in or by import path, and not a file or a hub id."""
    return isinstance(name, str) and not name.startswith(HUB) and not _exists(name) and is_environment(name)


def _exists(name: str) -> bool:
    """Return True if a path exists; a name that is too long for a path is none."""
    try:
        return Path(name).exists()
    except OSError:
        return False


def environment_files(source: TableSource) -> list[Path]:
    """Return the module of an environment that is named by an import path, and the own modules that it imports."""
    name = source.source
    if not isinstance(name, str) or ":" not in name or not is_generator(name):
        return []
    return [Path(file) for file in own_files([name])]


def local_files(source: TableSource) -> list[Path]:
    """Return the files that a source names, in order; none for a generator or a hub id.

    A name is a file, a folder of files, or a pattern with `*` or `?`. Raises DataError if one names no file, or if a file is named twice.
    """
    files = [path for name in source.names for path in _files_of(name, source)]
    refuse_twice(files)
    return files


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?")


def _matches(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, in order. Raises DataError if there are none."""
    path = Path(pattern)
    found = sorted(p for p in path.parent.glob(path.name) if p.is_file())
    if not found:
        raise DataError(f"{pattern}: no file matches this pattern. Patterns are paths from the project's root.")
    return found


def _files_of(name: str, source: TableSource) -> list[Path]:
    if name.startswith(HUB) or is_generator(name):
        return []
    path = Path(name)
    try:
        if path.is_dir():
            return folder_files(path, source.wanted_split)
    except OSError as error:
        raise DataError(
            f"{name}: cannot be read ({error.strerror}); name a folder of this project that can be read"
        ) from None
    if _is_pattern(name):
        return pattern_files(name, _matches(name), source.split)
    return [path] if is_readable(path) else []


def _generated(kind: Sourced, source: TableSource, data: DataParams) -> list[Row]:
    """Return the rows of a built-in generator. Raises ConfigError for options that have no effect on it."""
    require_files(kind, source)
    assert kind != "labelled"
    require_effect(kind, source)
    assert isinstance(source.source, str)
    assert source.rows is not None
    return checked_rows(environment(source.source), kind, source.rows, data.seed, _options(source.source, data))


def require_files(kind: Sourced, source: TableSource) -> None:
    """Raise ConfigError for a generator of labelled answers, or as one of several sources."""
    if kind == "labelled" and is_generator(source.source):
        raise ConfigError(
            f"data.labelled.source = {source.source!r}: generators make no labelled answers. Leave data.labelled out: the answers of the"
            " generated pairs are used, chosen ones with thumbs up and rejected ones with thumbs down"
        )
    made = [name for name in source.names if is_generator(name)]
    if made and len(source.names) > 1:
        raise _several(kind, made[0])


def _several(kind: Sourced, name: str) -> ConfigError:
    return ConfigError(
        f"data.{kind}.source: the generator {name!r} cannot be one of several sources; give it as the only one"
    )


def require_effect(kind: Sourced, source: TableSource) -> None:
    """Raise ConfigError for a setting of files that a generator would ignore, and for a missing number of rows."""
    given = [field for field in ("columns", "extract", "graded", "preferred") if getattr(source, field) is not None]
    given += ["split"] if source.split not in (None, "train") else []
    if given:
        raise ConfigError(f"data.{kind}.{given[0]}: has no effect on the generator {source.source!r}. Remove it.")
    if source.rows is None:
        raise ConfigError(
            f"data.{kind}.rows: missing; a generator needs to know how many rows to make, e.g. rows: 1000"
        )


_INSTEAD = {".zip": "unpack it", ".xlsx": "save it as CSV", ".xls": "save it as CSV", ".txt": "write rows with columns"}
"""Advice for files of other kinds."""


def no_source(name: str) -> str:
    """Return why a name is no source: a file of a kind that cannot be read, or nothing that is here."""
    kinds = f"{', '.join(READERS)}; also .gz, .bz2, .xz, .zst"
    if _exists(name) and Path(name).is_file():
        suffix = Path(name).suffix.lower()
        return f"files that end in {suffix or 'nothing'!r} cannot be read; {_INSTEAD.get(suffix, 'convert it')}. Known are {kinds}"
    return f"no such file, folder or generator{nearest(name, built_in())}; or a file ({kinds}), a folder of them, or hub:OWNER/NAME"


def _options(name: str, data: DataParams) -> dict[str, Any]:
    """Return the options of an environment: the section of its name, or its entry in `data.environments`."""
    if name == "arithmetic":
        return data.arithmetic.model_dump()
    if name == "stories":
        if data.stories is None:
            raise ConfigError("data.stories: missing; the generator stories needs {words: [...], openings: [...]}")
        return data.stories.model_dump()
    return data.environments.get(name, {})


def _records(kind: Sourced, source: TableSource) -> list[Record]:
    """Return the records of a file or hub source."""
    parts: list[tuple[str, list[Record]]] = []
    local_files(source)
    for name in source.names:
        if name.startswith(HUB):
            parts.append((name, _hub(kind, name, source.wanted_split)))
            continue
        if is_generator(name):
            raise _several(kind, name)
        files = _files_of(name, source)
        if not files:
            raise ConfigError(f"data.{kind}.source = {name!r}: {no_source(name)}")
        parts += [(str(path), read_file(path)) for path in files]
    require_alike(kind, source, parts)
    return [record for _, records in parts for record in records]


def _hub(kind: Sourced, source: str, split: str) -> list[Record]:
    """Load hub:OWNER/NAME[:CONFIGURATION][@REVISION]."""
    name, _, revision = source.removeprefix(HUB).partition("@")
    name, _, configuration = name.partition(":")
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(name, configuration or None, split=split, revision=revision or None)
    except Exception as error:
        raise DataError(
            f"data.{kind}.source = {source!r}: cannot load split {split!r}: {type(error).__name__}: {error}."
            " Steps run offline by default: set HF_HUB_OFFLINE=0 to download, and check the id and data.*.split."
        ) from error
    return table_records(loaded.with_format("arrow")[:], source)
