"""The one set of tokens that end an answer: what sampling stops at, training teaches, evaluation counts and folders save.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> tokenizer = byte_tokenizer(64)
    >>> next(iter(end_tokens(tokenizer))) == tokenizer.eos_token_id == template_end(tokenizer)
    True
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from posttrain.data.conversations import ChatTemplate
from posttrain.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "posttrain-answer"


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: Iterable[int] = ()) -> dict[int, str]:
    """Return the ids that end an answer, each with its origin; the first is the tokenizer's.

    All ends stop an answer: the tokenizer's end of sequence, the token by which the chat template closes an assistant's turn, and
    `configured`, the list of the model's generation settings. Of the list only special tokens count: a class default such as 2 may be
    an ordinary word of this vocabulary.
    """
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ends = {int(tokenizer.eos_token_id): "tokenizer"}
    closing = template_end(tokenizer)
    if closing is not None:
        ends.setdefault(closing, "chat template")
    for token in configured:
        if token in special:
            ends.setdefault(int(token), "generation settings")
    return ends


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token by which the chat template closes an assistant's turn, None if there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        text = ChatTemplate(tokenizer).render(turns, row="of the probe for its end")
    except (
        DataError
    ):  # it refuses a plain question and answer: rows of such turns are refused by name when they are read
        return None
    after = tokenizer(text.rpartition(MARK)[2].strip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return int(after[0]) if after and after[0] in special else None


def described(tokenizer: PreTrainedTokenizerBase, ends: dict[int, str]) -> str:
    """Return the ends as text, such as `<|im_end|> (tokenizer), <|eot|> (generation settings)`."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({origin})" for token, origin in ends.items())
