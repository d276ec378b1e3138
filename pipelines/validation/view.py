"""Build the data frames that expectations check: one per table, with every fact about a row in a column of a simple type."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines.data.tables import (
    ANSWERED,
    EQUATION,
    HELD_OUT,
    SCORES,
    TEXT,
    WEIGHT,
    Row,
    Table,
    is_messages,
    is_number,
    plain,
)
from pipelines.validation.leakage import prompt_keys
from posttrain.errors import DataError
from posttrain.text import is_blank

POSITION = "position"
"""Index of a row in its table: how results point at rows."""
DIGEST_BYTES = 16
DIGEST = f"V{DIGEST_BYTES}"
"""NumPy's type of a row's digest."""
BLANK = 0
"""Key of a text without a character other than white space."""
TEMPLATE = "template"
"""Why the chat template refuses a row; empty if it does not."""


UNKNOWN = "unknown_share"
"""Share of a row's tokens that are unknown to the tokenizer."""


class Lengths(Protocol):
    """Tokens of a row, as the model is going to see them. Raises DataError if the chat template refuses the row."""

    def prompt(self, row: Row) -> int: ...

    def pair(self, row: Row, column: str) -> tuple[int, int]:
        """Return the tokens of prompt and completion; the completion begins with the first token that carries loss."""
        ...

    def unknown(self, row: Row) -> float:
        """Return the share of the row's tokens that the tokenizer does not know."""
        ...


def structure_view(rows: Sequence[Row]) -> pd.DataFrame:
    """Return a column of True for every name: only names and the number of rows are checked, and values would be hashed."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pd.DataFrame({name: np.ones(len(rows), dtype=bool) for name in names})


def types_view(table: Table, rows: Sequence[Row]) -> pd.DataFrame:
    """Return `{column}_type` of every text column, and the scores."""
    columns = _positions(rows)
    for name in typed_columns(table):
        columns[f"{name}_type"] = pd.Series([kind(row.get(name)) for row in rows], dtype=object)
    columns |= {name: _floats(row[name] for row in rows) for name in present_scores(rows)}
    return pd.DataFrame(columns, copy=False)


def content_view(table: Table, rows: Sequence[Row], lengths: Lengths) -> pd.DataFrame:
    """Return text keys, token counts, scores, weight, answer, and in `row` the position of the first row that equals this one."""
    columns = _positions(rows)
    columns |= {name: _text_keys(rows, name) for name in TEXT[table]}
    counted = {name: np.zeros(len(rows), dtype=np.int64) for name in TEXT[table]}
    refused = []
    for i, row in enumerate(rows):
        tokens, why = _tokens(table, row, lengths)
        refused.append(why)
        for name in TEXT[table]:
            counted[name][i] = tokens[name]
    columns |= {f"{name}_tokens": counts for name, counts in counted.items()}
    columns[UNKNOWN] = _floats(lengths.unknown(row) for row in rows)
    if any(refused) or any(isinstance(row[name], list) for row in rows for name in TEXT[table]):
        columns[TEMPLATE] = pd.Series(refused, dtype=object)
    columns |= {name: _floats(row[name] for row in rows) for name in present_scores(rows)}
    if is_number(table, WEIGHT) and WEIGHT in rows[0]:
        columns[WEIGHT] = _floats(row[WEIGHT] for row in rows)
    if table in ANSWERED and "answer" in rows[0]:
        columns["answer"] = pd.Series([plain(row["answer"]) for row in rows], dtype=object)
        if EQUATION in rows[0]:
            columns[EQUATION] = pd.Series([plain(row[EQUATION]) for row in rows], dtype=object)
    columns["row"] = _first_equal(rows)
    return pd.DataFrame(columns, copy=False)


def _positions(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the columns that name a row. Numbers of NumPy have 8 bytes, those of Python 40."""
    return {POSITION: np.arange(len(rows)), "id": np.fromiter((row["id"] for row in rows), np.int64)}


def _floats(values: Iterable[float | None]) -> NDArray[np.float64]:
    """Return numbers as a column, NaN for a missing one."""
    return np.fromiter((math.nan if value is None else value for value in values), np.float64)


def _text_keys(rows: Sequence[Row], name: str) -> NDArray[np.int64]:
    """Return a 64-bit key of each row's text, [rows]: equal texts have equal ones, and BLANK is the key of no text.

    Great Expectations would encode and hash the texts of a frame, which needs about twice their size.
    """
    texts = (_judged(row[name], name) for row in rows)
    return np.fromiter((_number(_digest(text)) if not is_blank(text) else BLANK for text in texts), np.int64, len(rows))


def _number(digest: bytes) -> int:
    """Return the first 64 bits of a digest, never BLANK."""
    return int.from_bytes(digest[:8], signed=True) or 1


def _first_equal(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Return for each row the position of the first row with the same content, [rows]."""
    digests = np.frombuffer(row_digests(rows), dtype=DIGEST)
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    return first[which].astype(np.int64)


def _judged(value: Any, name: str) -> str:
    """Return the text that rules look at: nothing for a completion without an assistant's text."""
    text = plain(value if name == "prompt" else _trained(value))
    if name == "prompt" or not isinstance(value, list):
        return text
    spoken = [m for m in value if m["role"] == "assistant" and (not is_blank(m["content"]) or m.get("tool_calls"))]
    return text if spoken else ""


def _trained(value: Any) -> Any:
    """Return the turns of a completion up to the last one that is trained, without weights that change nothing; anything else as it is."""
    if not is_messages(value):
        return value
    trained = [i for i, turn in enumerate(value) if turn["role"] == "assistant" and turn.get("weight", 1)]
    stop = trained[-1] + 1 if trained else len(value)
    plain_weight = [turn["role"] != "assistant" or turn.get("weight") == 1 for turn in value]
    return [
        {name: field for name, field in turn.items() if name != "weight" or not same}
        for turn, same in zip(value[:stop], plain_weight, strict=False)
    ]


def _tokens(table: Table, row: Row, lengths: Lengths) -> tuple[dict[str, int], str]:
    """Return the tokens of each text column, and why the chat template refuses the row, if it does."""
    counted = dict.fromkeys(TEXT[table], 0)
    completions = [name for name in TEXT[table] if name != "prompt"]
    try:
        for name in completions:
            if not isinstance(row[name], list) or _judged(row[name], name):
                prompt, counted[name] = lengths.pair(row, name)
                counted["prompt"] = max(counted["prompt"], prompt)
        if not completions:
            counted["prompt"] = lengths.prompt(row)
    except DataError as error:
        return counted, str(error)
    return counted, ""


def prompts_view(tables: Sequence[tuple[Table, Sequence[Row]]]) -> pd.DataFrame:
    """Return one line for each key that prompts are compared by, of all tables below each other.

    The keys are 64-bit digests: a million of them take 8 MB. Who reads a finding compares the keys themselves.
    """
    columns = {POSITION: array("q"), "held_out": array("b"), "prompt_key": array("q")}
    every = ((table, row) for table, rows in tables for row in rows)
    for position, (table, row) in enumerate(every):
        for key in sorted(prompt_keys(row, table in HELD_OUT)):
            columns[POSITION].append(position)
            columns["held_out"].append(table in HELD_OUT)
            columns["prompt_key"].append(_number(_digest(key)))
    types = {POSITION: "int64", "held_out": "bool", "prompt_key": "int64"}
    return pd.DataFrame({name: np.array(values, dtype=types[name]) for name, values in columns.items()})


def typed_columns(table: Table) -> tuple[str, ...]:
    """Return the columns whose type is checked."""
    return (*TEXT[table], "answer") if table in ANSWERED else TEXT[table]


def present_scores(rows: Sequence[Row]) -> list[str]:
    """Return the score columns that the rows have."""
    return [name for name in SCORES if rows and name in rows[0]]


def kind(value: Any) -> str:
    """Return text, messages, missing, or the JSON type of a wrong value."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "text"
    if is_messages(value):
        return "messages"
    names = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)


def row_digests(rows: Iterable[Row]) -> bytearray:
    """Return the digests of all rows in one piece, as DIGEST reads them."""
    digests = bytearray()
    for row in rows:
        digests += row_digest(row)
    return digests


def row_digest(row: Row) -> bytes:
    """Return a digest of what is trained of a row, without its origin: equal rows have equal ones, and a table of digests stays small."""
    held = {k: v if k == "prompt" else _trained(v) for k, v in row.items() if k not in ("id", "record")}
    text = json.dumps(held, sort_keys=True, default=str)
    return _digest(text)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
