"""How a reward model that was trained elsewhere reads a prompt and an answer: as text, through its own chat template.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> encoder = TextEncoder(byte_tokenizer(64), 64)
    >>> (row,) = whole_texts(encoder, ["1+1="], ["2"])
    >>> encoder.tokenizer.decode(row.prompt + row.response).count("assistant")
    1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.conversations import as_messages
from posttrain.data.tokens import Text, TextEncoder, Tokens, row_tools
from posttrain.errors import DataError

READS_TEXT = "reads_text"
"""Key in config.json of a reward model that was trained elsewhere: it reads texts, not the policy's tokens."""


def reads_same_tokens(one: TextEncoder, other: TextEncoder) -> bool:
    """Return True if both encoders make the same tokens of every text and conversation."""
    templates = [encoder.tokenizer.chat_template for encoder in (one, other)]
    return templates[0] == templates[1] and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def whole_texts(
    encoder: TextEncoder,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[Tokens]:
    """Return `read_texts` without the number of those that were cut."""
    return read_texts(encoder, prompts, completions, columns)[0]


def read_texts(
    encoder: TextEncoder,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]] | None = None,
    pad: int | None = None,
) -> tuple[list[Tokens], int]:
    """Return each prompt with its answer in the encoder's own tokens, and how many lost their start to fit its context.

    With a chat template, plain text becomes a turn of the user and one of the assistant, and the score is read at the last token of the
    rendered conversation, as the examples of published reward models do. Without one, prompt and answer are joined and closed.

    Args:
        pad: the model's pad token. transformers reads the score at the last token that is not pad, so ends that are pad are left out.
    """
    offered = (columns or {}).get("tools") or [None] * len(prompts)
    texts = zip(prompts, completions, offered, strict=True)
    rows = [_without_pad(_ids(encoder, *text, str(i)), pad) for i, text in enumerate(texts)]
    return read_ends([Tokens(tuple(ids[:-1]), tuple(ids[-1:])) for ids in rows], encoder.max_length)


def read_ends(rows: Sequence[Tokens], context: int | None) -> tuple[list[Tokens], int]:
    """Return the rows, those that are longer than the context without their start, and how many these are.

    Example:
        >>> read_ends([Tokens((1, 2, 3), (4,)), Tokens((1,), (2,))], context=3)
        ([Tokens(prompt=(2, 3), response=(4,), id='', weights=None), Tokens(prompt=(1,), response=(2,), id='', weights=None)], 1)
    """
    if context is None or all(len(row) <= context for row in rows):
        return list(rows), 0
    ends = [(row.prompt + row.response)[-context:] for row in rows]
    read = [row if len(row) <= context else Tokens(ids[:-1], ids[-1:]) for row, ids in zip(rows, ends, strict=True)]
    return read, sum(len(row) > context for row in rows)


def _without_pad(ids: list[int], pad: int | None) -> list[int]:
    while len(ids) > 1 and ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _ids(encoder: TextEncoder, prompt: Text, completion: Text, tools: Any, row: str) -> list[int]:
    if encoder.tokenizer.chat_template:
        turns = [*as_messages(prompt, "user"), *as_messages(completion, "assistant")]
        text = encoder.template.conversation(turns, row_tools({"tools": tools}), row=row)
        return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    if isinstance(prompt, str) and isinstance(completion, str):
        return [*encoder.prompt(prompt), *encoder.completion(completion)]
    raise DataError(
        f"row {row}: its text is chat messages, and the tokenizer of the reward model has no chat template; choose another"
        " reward.source, or map the columns to plain text in data.*.columns"
    )
