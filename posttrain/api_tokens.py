"""Tokens of the rows that `train` is given, with a line on stderr if training and sampling would ask in different words.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> encoder = TextEncoder(byte_tokenizer(64), 64)
    >>> (row,) = answer_tokens(encoder, [{"id": 0, "prompt": "1+1=", "completion": "2"}], "completion")
    >>> encoder.text(row.prompt), encoder.text(row.response)
    ('1+1=', '2')
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from posttrain.data.conversations import TrainOn, as_messages
from posttrain.data.tokens import TextEncoder, Tokens, asked_and_answered, row_tools, table_answers

CHECKED = 100
"""Rows whose prompts are compared with those of sampling."""


def answer_tokens(encoder: TextEncoder, rows: Sequence[dict[str, Any]], column: str) -> list[Tokens]:
    """Return the tokens of each row's prompt and answer as one sequence; see `answers_of`."""
    return [tokens for (tokens,) in answers_of(encoder, rows, column)]


def answers_of(
    encoder: TextEncoder, rows: Sequence[dict[str, Any]], column: str, train_on: TrainOn = "completion"
) -> list[list[Tokens]]:
    """Return the tokens of the prompts and of the answers in a column, and report answers that follow a different text than in sampling.

    A generation prompt that opens `<think>` and answers without reasoning differ so. With `each` a row has several sequences.
    """
    answers = table_answers(encoder, rows, column, train_on)
    found = [i for i, row in enumerate(rows[:CHECKED]) if not _is_asked(encoder, row, column, train_on)]
    if found:
        tqdm.write(
            f"{len(found)} of the first {min(CHECKED, len(rows))} rows ({column}; first: row {found[0]}) are trained after another text"
            " than the prompt of sampling, as with a generation prompt that opens <think>: put the reasoning, also an empty one, into the"
            " answers",
            file=sys.stderr,
        )
    return answers


def _is_asked(encoder: TextEncoder, row: dict[str, Any], column: str, train_on: TrainOn) -> bool:
    """Return True if each trained answer of a row follows the prompt by which sampling asks for it."""
    prompt, answer, tools = row["prompt"], row[column], row_tools(row)
    if isinstance(prompt, str) and isinstance(answer, str):
        return True
    parts: list[tuple[Any, Any]] = [(as_messages(prompt, "user"), as_messages(answer, "assistant"))]
    if train_on == "each":
        parts = [(asked, [answered]) for asked, answered in asked_and_answered(prompt, answer)]
    return all(
        encoder.template.is_asked([*asked, *answered], span, text, tools)
        for asked, answered in parts
        for text, spans in [encoder.template.spans(asked, answered, tools, train_on)]
        for span in spans
    )
