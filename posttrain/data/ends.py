"""The one set of tokens that end an answer: what sampling stops at, training teaches, evaluation counts and folders save.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> tokenizer = byte_tokenizer(64)
    >>> next(iter(end_tokens(tokenizer))) == tokenizer.eos_token_id == template_end(tokenizer)
    True
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.conversations import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 6
"""Most ends that a message names."""


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: Iterable[int] = ()) -> dict[int, str]:
    """Return the ids that end an answer, each with its origin; the first is the tokenizer's.

    All ends stop an answer: the tokenizer's end of sequence, the token by which the chat template closes an assistant's turn, and
    `configured`, the list of the model's generation settings. Of the list only special and added tokens count: a class default such as 2
    may be an ordinary word of this vocabulary.
    """
    marks = _marks(tokenizer)
    ends = {int(tokenizer.eos_token_id): "tokenizer"}
    closing = template_end(tokenizer)
    if closing is not None:
        ends.setdefault(closing, "chat template")
    for token in configured:
        if token in marks:
            ends.setdefault(int(token), "generation settings")
    return ends


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special and added tokens. Many tokenizers add the tokens of their template without calling them special."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special or added token by which the chat template closes an assistant's turn, None if there is none."""
    if not tokenizer.chat_template:
        return None
    found = ChatTemplate(tokenizer).closings()
    if found is None:
        return None
    last, inner, opening = (
        tokenizer(text.strip(), add_special_tokens=False)["input_ids"] if text else []
        for text in (found.last, found.inner, found.opening)
    )
    # some templates close an answer only before a further turn; how that turn opens is no closing
    closing = last[:1] or [token for token in inner[:1] if token not in opening]
    return int(closing[0]) if closing and closing[0] in _marks(tokenizer) else None


def described(tokenizer: PreTrainedTokenizerBase, ends: dict[int, str]) -> str:
    """Return the first ends as text, such as `<|im_end|> (tokenizer), <|eot|> (generation settings)`, and the number of others."""
    return first_of([f"{tokenizer.convert_ids_to_tokens(token)} ({origin})" for token, origin in ends.items()])


def first_of(texts: Sequence[str], separator: str = ", ") -> str:
    """Return the first texts, and the number of others: a folder may name hundreds of ends."""
    more = [] if len(texts) <= SHOWN else [f"and {len(texts) - SHOWN} more"]
    return separator.join([*texts[:SHOWN], *more])


def as_list(named: Any) -> list[Any]:
    """Return the ids of a setting `eos_token_id`, which may be missing, one id or a list."""
    return [] if named is None else named if isinstance(named, list) else [named]


def written_ends(folder: Path) -> dict[str, list[Any]]:
    """Return the ends of sequence that the files of a model folder spell out; a class default, which no file has, is none."""
    found = {}
    for name in ("generation_config.json", "config.json"):
        try:
            tree = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a hub id, or a damaged file, which loading the model reports
            continue
        parts = [tree, tree.get("text_config")] if isinstance(tree, dict) else []
        ids = [token for part in parts if isinstance(part, dict) for token in as_list(part.get("eos_token_id"))]
        if ids:
            found[name] = list(dict.fromkeys(ids))
    return found


def differing_ends(
    tokenizer: PreTrainedTokenizerBase, ends: Mapping[int, str], written: Mapping[str, list[Any]]
) -> str | None:
    """Return how a folder's files disagree about the ends of an answer and which ends count, None if they agree.

    They disagree if a file names a token that is no end here, or if no file names the tokenizer's own end.
    """
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    reasons = [
        f"{name} names {token}, "
        + (f"an ordinary token ({known[token]!r})" if token in known else "which is no token of the vocabulary")
        for name, ids in written.items()
        for token in ids
        if token not in ends
    ]
    own = next(iter(ends))
    if written and not any(own in ids for ids in written.values()):
        others = "; ".join(f"{name} names {first_of([*map(str, ids)])}" for name, ids in written.items())
        reasons.append(f"the tokenizer's eos token is {known[own]!r} ({own}), and {others}")
    if not reasons:
        return None
    reason = first_of(reasons, "; ")
    return (
        f"its files disagree about the end of an answer: {reason}. Answers end with {described(tokenizer, dict(ends))}; plain answers are"
        f" trained to end with {known[own]!r}. Correct eos_token of tokenizer_config.json, or eos_token_id, if this is wrong"
    )
