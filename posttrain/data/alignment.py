"""Token ids of a rendered conversation, and the weight of each token in the loss.

Example:
    >>> from posttrain.models.tiny import byte_tokenizer
    >>> len(continuation_ids(byte_tokenizer(64), "42"))
    2
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from posttrain.data.conversations import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "=", "(", "0", "a")
_SPACES = ("\u2581", "\u0120")
"""Characters that tokenizers write for a space before the first word."""


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that continues other text: "4" after "2+2=" has no space before it."""
    ids = _ids(tokenizer, text)
    if not ids or text[:1].isspace() or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(_SPACES):
        return ids
    for anchor in _ANCHORS:
        alone, both = _ids(tokenizer, anchor), _ids(tokenizer, anchor + text)
        if both[: len(alone)] == alone and len(both) > len(alone):
            return both[len(alone) :]
    return ids


def weighted_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], eos_id: int
) -> tuple[list[int], list[float]]:
    """Return the ids of the whole text and the weight of each, 0 outside the spans.

    White space after a turn's closing token is not trained: nothing is sampled there. A last turn without a closing token gets `eos_id`.
    """
    ids, starts = _located(tokenizer, text, sorted({edge for span in spans for edge in (span.start, span.stop)}))
    weights = [0.0] * len(ids)
    special = special_ids(tokenizer) | {eos_id}
    for span in spans:
        inside = [i for i, start in enumerate(starts) if span.start <= start < span.stop]
        for i in inside:
            weights[i] = span.weight
        closing = next((i for i in reversed(inside) if ids[i] in special), None)
        if closing is not None and not str(tokenizer.decode(ids[closing + 1 : inside[-1] + 1])).strip():
            weights[closing + 1 : inside[-1] + 1] = [0.0] * (inside[-1] - closing)
        elif not text[span.stop :].strip():
            ids, weights = ids[: inside[-1] + 1] if inside else ids, weights[: inside[-1] + 1] if inside else weights
            return [*ids, eos_id], [*weights, span.weight]
    return ids, weights


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that are no text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _located(tokenizer: PreTrainedTokenizerBase, text: str, edges: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return ids and the character at which each begins. A text is cut at the edges only if a token would lie across one."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if not any(start < edge < stop for start, stop in offsets for edge in edges):
            return list(encoded["input_ids"]), [start for start, _ in offsets]
    ids: list[int] = []
    starts: list[int] = []
    for start, stop in pairwise([0, *edges, len(text)]):
        piece = text[start:stop]
        added = continuation_ids(tokenizer, piece) if start else _ids(tokenizer, piece)
        ids += added
        starts += [start] * len(added)
    return ids, starts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
