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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    found = ChatTemplate(tokenizer).closings()
    if found is None:
        return None
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    last, inner, opening = (
        tokenizer(text.strip(), add_special_tokens=False)["input_ids"] if text else []
        for text in (found.last, found.inner, found.opening)
    )
    # some templates close an answer only before a further turn; how that turn opens is no closing
    closing = last[:1] or [token for token in inner[:1] if token not in opening]
    return int(closing[0]) if closing and closing[0] in special else None


def described(tokenizer: PreTrainedTokenizerBase, ends: dict[int, str]) -> str:
    """Return the ends as text, such as `<|im_end|> (tokenizer), <|eot|> (generation settings)`."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({origin})" for token, origin in ends.items())
