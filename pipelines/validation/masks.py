"""Which tokens of a row are trained, as parts of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pipelines.data.tables import TEXT, Row, Table
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.data.tokens import TextEncoder, Tokens

Part = tuple[str, int, bool]
"""Text, its number of tokens, and whether they are trained."""


def trained_parts(encoder: TextEncoder, table: Table, row: Row) -> dict[str, list[Part]]:
    """Return the parts of each trained column; of a table without answers, the prompt as the model is going to see it."""
    from posttrain.data.tokens import Tokens, row_tools

    name, tools = str(row["id"]), row_tools(row)
    columns = [column for column in TEXT[table] if column != "prompt"]
    if not columns:
        return {"prompt": _parts(encoder, Tokens(tuple(encoder.prompt(row["prompt"] or "", tools, name)), ()))}
    return {
        column: _parts(encoder, encoder.tokens(row["prompt"] or "", row[column] or "", name, tools))
        for column in columns
    }


def _parts(encoder: TextEncoder, tokens: Tokens) -> list[Part]:
    weights = tokens.weights or (1.0,) * len(tokens.response)
    marked = [(i, False) for i in tokens.prompt] + [
        (i, weight != 0) for i, weight in zip(tokens.response, weights, strict=True)
    ]
    parts = []
    for trained, group in groupby(marked, key=lambda pair: pair[1]):
        ids = [i for i, _ in group]
        parts.append((str(encoder.tokenizer.decode(ids, skip_special_tokens=False)), len(ids), trained))
    return parts


def left_out(encoder: TextEncoder, table: Table, rows: Sequence[Row]) -> dict[str, int]:
    """Return how many turns of a table lose a part that the chat template does not show: earlier reasoning, or a speaker's name."""
    from posttrain.data.conversations import as_messages, hidden_reasoning
    from posttrain.data.tokens import row_tools

    counts = {
        "earlier turns whose reasoning the chat template leaves out": 0,
        "turns whose `name` the chat template leaves out": 0,
    }
    reasoning, names = counts
    for row in rows:
        for column in [column for column in TEXT[table] if column != "prompt"] or [""]:
            prompt, answer = row["prompt"] or "", (row[column] or "") if column else ""
            if isinstance(prompt, str) and isinstance(answer, str):
                continue
            messages = [*as_messages(prompt, "user"), *(as_messages(answer, "assistant") if column else ())]
            try:
                text = encoder.template.render(messages, row_tools(row), generate=not column, row=str(row["id"]))
            except DataError:  # the rule chat_template has reported the row
                continue
            counts[reasoning] += len(hidden_reasoning(text, messages))
            counts[names] += sum(
                str(turn["name"]) not in text for turn in messages if turn.get("name") and turn["role"] != "tool"
            )
    return {what: count for what, count in counts.items() if count}


def samples(encoder: TextEncoder, tables: Mapping[Table, Sequence[Row]], count: int) -> list[tuple[str, list[Part]]]:
    """Return the first `count` rows of each table with their trained parts."""
    return [
        (f"{table} {row['id']}, {column}", parts)
        for table, rows in sorted(tables.items())
        for row in rows[:count]
        for column, parts in trained_parts(encoder, table, row).items()
    ]
