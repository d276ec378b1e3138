"""Read and write the five canonical tables as Parquet files; columns, types and bytes depend only on the rows.

A typed column cannot store a value of the wrong type, such as a JSON boolean in a text column. Such a value goes into the column
`wrong_type`, so that validation can find, count and show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.errors import DataError
from posttrain.files import read_json

Table = Literal["sft", "preferences", "preferences_heldout", "problems", "evaluation", "labelled"]
Row = dict[str, Any]
TEXT: Mapping[Table, tuple[str, ...]] = {
    "sft": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "preferences_heldout": ("prompt", "chosen", "rejected"),
    "problems": ("prompt",),
    "evaluation": ("prompt",),
    "labelled": ("prompt", "completion"),
}
"""Columns that hold text: a string, or chat messages."""
ANSWERED: tuple[Table, ...] = ("problems", "evaluation")
"""Tables with a gold `answer`, a string."""
SCORES = ("chosen_score", "rejected_score")
ULTRAFEEDBACK = dict(zip(("score_chosen", "score_rejected"), SCORES, strict=True))
"""UltraFeedback's names of the scores, and ours."""
TRAINING: tuple[Table, ...] = ("sft", "preferences", "problems", "labelled")
HELD_OUT: tuple[Table, ...] = ("evaluation", "preferences_heldout")
OPTIONAL: tuple[Table, ...] = ("labelled",)
"""Tables without rows if params.yaml does not configure them."""
LABEL = "label"
"""Column of `labelled`: True for an answer with thumbs up, False for one with thumbs down."""
EQUATION = "equation"
"""Optional column in tables with an answer: an arithmetic expression whose value must be the answer."""
WEIGHT = "weight"
"""Optional column in `sft`: the weight of each token of the row, a number that is not negative."""
EXPERT = "expert"
"""Column in `sft` if `data.experts` is configured: True for its rows, which supervised fine-tuning leaves out."""
TOOLS = "tools"
"""Optional: the tools that a conversation offers, as JSON."""
FOLDER = Path("data/tables")
"""Folder that ingest writes the tables to."""
CHANGES = "changes.json"
"""Next to the tables: how many records ingest left out or changed, by table and description. Missing if none."""
WRONG_TYPE = "wrong_type"
RESERVED = ("record", "reason", WRONG_TYPE, EXPERT)
"""Columns that this project writes into tables: a further column of a source cannot have such a name."""
_TURN = [("role", pa.string()), ("content", pa.string())]
_MESSAGES = pa.list_(pa.struct(_TURN))
_MESSAGES_WITH_FIELDS = pa.list_(pa.struct([*_TURN, ("fields", pa.string())]))
"""`fields`: the message's other fields as JSON, such as tool_calls, name and weight."""


def required(table: Table) -> tuple[str, ...]:
    """Return the canonical columns that every row of the table has."""
    more = ("answer",) if table in ANSWERED else (LABEL,) if table == "labelled" else ()
    return (*TEXT[table], *more)


def present(table: Table, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the canonical columns of these rows: problems may have no answers, for rewards that read none."""
    unanswered = table == "problems" and bool(rows) and not any("answer" in row for row in rows)
    return tuple(name for name in required(table) if not (unanswered and name == "answer"))


def is_messages(value: Any) -> bool:
    """Return True if the value is chat messages: a non-empty list of {role, content} with string values."""
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(message: Any) -> bool:
    """Return True if the value is one chat message."""
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def is_text(value: Any) -> bool:
    """Return True if the value is a string or chat messages."""
    return isinstance(value, str) or is_messages(value)


def plain(value: Any) -> str:
    """Return the text of a string or of chat messages, to compare and to show; nothing for a missing value."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not is_messages(value):
        return json.dumps(value)
    if len(value) == 1 and set(value[0]) == {"role", "content"}:
        return str(value[0]["content"])
    return "\n".join(_shown(message) for message in value)


def _shown(message: Mapping[str, Any]) -> str:
    """Return a turn with its role, and with other fields such as tool calls."""
    other = {name: message[name] for name in sorted(set(message) - {"role", "content"})}
    fields = f" {json.dumps(other, sort_keys=True, ensure_ascii=False)}" if other else ""
    return f"{message['role']}: {message['content']}{fields}"


def group_labels(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the group of each evaluation prompt as text, from the column that `evaluation.groups` names.

    Raises:
        DataError: a row has no value there, or two spellings of one number would be two groups.
    """
    values = [row.get(name) for row in rows]
    lacking = [i for i, value in enumerate(values) if value is None or not str(value).strip()]
    if lacking:
        columns = sorted({column for row in rows for column in row} - {"prompt", "id"})
        raise DataError(
            f"evaluation.groups = {name!r}: {len(lacking)} evaluation prompts have no value in this column (first: prompt"
            f" {lacking[0]}). Without its group a prompt would count as independent. The columns are {', '.join(columns)}."
            " A mapping in data.evaluation.columns must name the column, too."
        )
    labels = [str(value).strip() for value in values]
    spelt: dict[float, str] = {}
    for label in sorted({*labels}):
        number = _as_number(label)
        if number is not None and spelt.setdefault(number, label) != label:
            raise DataError(
                f"evaluation.groups = {name!r}: the values {spelt[number]!r} and {label!r} are the same number, and would be two groups;"
                " write them alike in the file"
            )
    return labels


def _as_number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def write_rows(table: Table, rows: Sequence[Row], path: Path, extra: Sequence[str] = ()) -> None:
    """Write rows as Parquet: `id`, the canonical columns, then other columns by name.

    `extra` names string columns that are written even if no row has them.
    """
    typed = [_set_apart(table, row) for row in rows]
    columns = [pa.field(name, _type(table, name, typed)) for name in _order(table, typed, extra)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    pq.write_table(
        pa.Table.from_pylist([_flat(row) for row in typed], schema=pa.schema(columns)),
        path,
        compression="zstd",
        version="2.6",
        store_schema=False,
        write_page_checksum=True,
    )


def write_changes(changes: Mapping[str, Mapping[str, int]], folder: Path) -> None:
    """Write the omissions and changes of ingest, if any."""
    some = {table: {name: n for name, n in sorted(counts.items()) if n} for table, counts in sorted(changes.items())}
    some = {table: counts for table, counts in some.items() if counts}
    path = folder / CHANGES
    path.unlink(missing_ok=True)
    if some:
        path.write_text(json.dumps(some, indent=1) + "\n", encoding="utf-8")


def read_changes(folder: Path) -> dict[str, dict[str, int]]:
    """Return the omissions and changes of ingest, by table and description."""
    path = folder / CHANGES
    found: dict[str, dict[str, int]] = read_json(path, "Type `dvc repro ingest`.") if path.exists() else {}
    return found


def read_rows(path: Path) -> list[Row]:
    """Return the rows as they were written, with values of a wrong type restored. Raises DataError if the file cannot be read."""
    if not path.exists():
        raise DataError(f"no table {path}; make it with `dvc repro ingest`")
    try:
        rows: list[Row] = pq.read_table(path, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a Parquet file that can be read ({error}); make it again with `dvc repro ingest`"
        ) from error
    for row in rows:
        row |= {name: _turns(value) for name, value in row.items() if isinstance(value, list)}
        row |= json.loads(row.pop(WRONG_TYPE, None) or "{}")
    return rows


def supervised_rows(table: Sequence[Row]) -> list[Row]:
    """Return the rows of the sft table that supervised fine-tuning trains on. Raises DataError if validation left none of them."""
    found = [row for row in table if not row.get(EXPERT)]
    if not found:
        raise DataError(
            "data/valid/sft.parquet has only rows of data.experts, so there is nothing to train on; see the quarantine in data/quarantine"
        )
    return found


def expert_rows(table: Sequence[Row]) -> list[Row]:
    """Return the demonstrations of an sft table: those of `data.experts`, or all rows if it is not configured.

    Raises DataError if validation left none of the experts' rows.
    """
    if EXPERT not in table[0]:
        return list(table)
    found = [row for row in table if row[EXPERT]]
    if not found:
        raise DataError(
            "data/valid/sft.parquet has no row of data.experts left, so there is nothing to demonstrate; see the quarantine in"
            " data/quarantine"
        )
    return found


def _turns(messages: list[Any]) -> list[Any]:
    return [message | json.loads(message.pop("fields", None) or "{}") for message in messages]


def _set_apart(table: Table, row: Row) -> Row:
    """Return the row with values of a wrong type moved into `wrong_type`, as JSON."""
    wrong = {name: row[name] for name in TEXT[table] if row[name] is not None and not is_text(row[name])}
    if "answer" in row and row["answer"] is not None and not isinstance(row["answer"], str):
        wrong["answer"] = row["answer"]
    if not wrong:
        return row
    return row | dict.fromkeys(wrong) | {WRONG_TYPE: json.dumps(wrong, sort_keys=True, default=str)}


def _order(table: Table, rows: Sequence[Row], extra: Sequence[str]) -> list[str]:
    """Return the order of the columns."""
    names = {name for row in rows for name in row} | set(extra)
    first = ["id", *present(table, rows), *(name for name in SCORES if name in names)]
    return [*first, *sorted(names - set(first))]


def is_number(table: Table, name: str) -> bool:
    """Return True if a column holds numbers."""
    return name in SCORES or (table == "sft" and name == WEIGHT)


def _type(table: Table, name: str, rows: Sequence[Row]) -> pa.DataType:
    """Return the Arrow type of a column."""
    if name in ("id", "record"):
        return pa.int64()
    if is_number(table, name):
        return pa.float64()
    if (table, name) in (("labelled", LABEL), ("sft", EXPERT)):
        return pa.bool_()
    turns = [turn for row in rows if isinstance(row.get(name), list) for turn in row[name]]
    if not turns:
        return pa.string()
    return _MESSAGES if all(set(turn) == {"role", "content"} for turn in turns) else _MESSAGES_WITH_FIELDS


def _flat(row: Row) -> Row:
    """Return the row with each message's other fields as JSON."""
    return {
        name: [_flat_turn(turn) for turn in value] if isinstance(value, list) else value for name, value in row.items()
    }


def _flat_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    other = {name: turn[name] for name in sorted(set(turn) - {"role", "content"})}
    fields = {"fields": json.dumps(other, sort_keys=True, ensure_ascii=False)} if other else {}
    return {"role": turn["role"], "content": turn["content"], **fields}
