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

from posttrain.data.conversations import Span, row_name
from posttrain.errors import DataError

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


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many special tokens the tokenizer adds after every text, such as an end of sequence."""
    own = _ids(tokenizer, _ANCHORS[-1])
    whole = list(tokenizer(_ANCHORS[-1], add_special_tokens=True)["input_ids"])
    return next((after for after in range(len(whole)) if whole[: len(whole) - after][-len(own) :] == own), 0)


def closed(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: Sequence[int], eos: int, row: str) -> list[int]:
    """Return the ids of a plain answer up to its first end, or with `eos`. Raises DataError if its text goes on after an end."""
    first = next((i for i, token in enumerate(ids) if token in ends), None)
    if first is None:
        return [*ids, eos]
    if str(tokenizer.decode([token for token in ids[first + 1 :] if token not in ends])).strip():
        raise _goes_on(tokenizer, ids[first], f"{row_name(row)}: the text of the answer")
    return ids[: first + 1]


def weighted_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], ends: Sequence[int], row: str = ""
) -> tuple[list[int], list[float]]:
    """Return the ids of the whole text and the weight of each, 0 outside the spans.

    Sampling stops at the first of `ends`, so nothing after a turn's first end is trained. An end that the template writes right after
    a span closes it. A last turn without an end gets `ends[0]`. Raises DataError if an end is before a turn's own text, or within it.
    """
    ids, starts = _located(tokenizer, text, spans)
    weights = [0.0] * len(ids)
    for span in spans:
        inside = [i for i, start in enumerate(starts) if span.start <= start < span.stop]
        for i in inside:
            weights[i] = span.weight
        if span.said is not None and any(ids[i] in ends for i in inside if starts[i] < span.said[0]):
            raise DataError(
                f"{row_name(row)}: the model's chat template closes the turn before turn {span.turn} (assistant) only as that one begins,"
                " so sampling would stop before the answer. Correct chat_template.jinja, or take a model with another template."
            )
        end = _end(tokenizer, ids, starts, inside, span, ends)
        if end is not None:
            _require_whole(tokenizer, ids, starts, span, end, row)
        if end is not None:
            for i in inside:
                weights[i] = span.weight if i <= end else 0.0
            weights[end] = span.weight
        elif not text[span.stop :].strip():
            ids, weights = ids[: inside[-1] + 1] if inside else ids, weights[: inside[-1] + 1] if inside else weights
            return [*ids, ends[0]], [*weights, span.weight]
    return ids, weights


def _require_whole(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], starts: Sequence[int], span: Span, end: int, row: str
) -> None:
    """Raise DataError if a turn's own text goes on after an end that it spells: nothing after that would be trained."""
    if span.said is None or starts[end] >= span.said[1]:
        return
    rest = [ids[i] for i in range(end + 1, len(ids)) if starts[i] < span.said[1]]
    if str(tokenizer.decode(rest)).strip():
        raise _goes_on(tokenizer, ids[end], f"{row_name(row)}: the text of turn {span.turn} (assistant)")


def _goes_on(tokenizer: PreTrainedTokenizerBase, end: int, text: str) -> DataError:
    return DataError(
        f"{text} contains {tokenizer.decode([end])!r}, the model's own end of an answer, so the model would stop there and never learn the"
        " rest. Write this token in another way, or remove the row."
    )


def _end(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    starts: Sequence[int],
    inside: Sequence[int],
    span: Span,
    ends: Sequence[int],
) -> int | None:
    """Return the position of the end that closes a turn: the first of its text or after that, the last within it, or the token after it."""
    if span.said is not None:
        after = next((i for i in inside if starts[i] >= span.said[0] and ids[i] in ends), None)
        if after is not None:
            return after
    within = next((i for i in reversed(inside) if ids[i] in ends), None)
    if within is not None and not str(tokenizer.decode(list(ids[within + 1 : inside[-1] + 1]))).strip():
        return within
    following = inside[-1] + 1 if inside else len(ids)
    return following if following < len(ids) and ids[following] in ends else None


def _located(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Return ids and the character at which each begins. A text is cut at the spans' edges only if a token would lie across one."""
    edges = sorted({edge for span in spans for edge in (span.start, span.stop)})
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if not any(start < edge < stop for start, stop in offsets for edge in edges):
            return list(encoded["input_ids"]), [start for start, _ in offsets]
    # a closing is a piece of its own, so that its end is found
    closings = {span.said[1] for span in spans if span.said and text[span.said[1] : span.stop].strip()}
    ids: list[int] = []
    starts: list[int] = []
    for start, stop in pairwise([0, *sorted({*edges, *closings}), len(text)]):
        piece = text[start:stop]
        added = continuation_ids(tokenizer, piece) if start else _ids(tokenizer, piece)
        ids += added
        starts += [start] * len(added)
    return ids, starts


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
