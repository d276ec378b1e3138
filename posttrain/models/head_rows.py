"""Attention over the parts of a flat batch with one head of one token a row, forward and backward, on CPUs.

PyTorch's kernel computes blocks of 32 queries and 512 keys. Segments of a few dozen tokens are computed faster by batched products with
all scores in memory, which are no more than the outputs. Longer segments take the kernel.

Example:
    One sequence of two tokens and one head; the queries are zeros, so each token reads the mean of all values until itself:

    >>> from posttrain.data.layout import Family, attended_parts
    >>> layout = head_layout(attended_parts([Family(range(1), (range(1, 2),))]), None, 2, heads=1, key_heads=1, window=None)
    >>> values = torch.tensor([[1.0], [3.0]])
    >>> attend(torch.zeros(3, 1), torch.zeros(2, 1), values, layout, kept=None).tolist()
    [[1.0], [2.0]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from posttrain.data.layout import Attended, Parts

SHORT_KEYS, SHORT_HEADS = 96, 2
"""Most keys of a segment whose scores are kept, and most keys per number of a head, so that scores need little more than outputs."""
SHARED, WIDE = 1.25, 256
"""Gathered keys per key from which on only the keys themselves are kept for the backward pass, and the least width of such a layer:
in a narrow one, whose products are fast, gathering them twice would take 4 % of an update."""
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class PartRows:
    """A part of the attention as rows of its inputs and outputs.

    Attributes:
        sizes: segments, heads, heads of keys, queries and keys.
        queries: [segments x heads x queries] rows of the queries; padding is the row of zeros after the last.
        keys: [segments x key heads x keys] rows of keys and values.
        bias: [1 or segments, 1, queries, keys] 0 or -inf; None means causal.
        rows: the part's own among all outputs, which are ordered as `queries`.
    """

    sizes: tuple[int, int, int, int, int]
    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    rows: slice

    def is_short(self, size: int) -> bool:
        """Return True if batched products compute the part, with heads of `size` numbers."""
        return self.sizes[-1] <= min(SHORT_KEYS, SHORT_HEADS * size)

    def folded_queries(self, states: Tensor) -> Tensor:
        """Return rows of queries as [segments x key heads, heads per key head x queries, size]."""
        segments, heads, key_heads, queries, _ = self.sizes
        return states.view(segments * key_heads, heads // key_heads * queries, -1)

    def folded_keys(self, states: Tensor) -> Tensor:
        """Return rows of keys as [segments x key heads, keys, size]."""
        segments, _, key_heads, _, keys = self.sizes
        return states.view(segments * key_heads, keys, -1)

    def queries_by_heads(self, states: Tensor) -> Tensor:
        """Return folded queries as [segments, heads, queries, size]."""
        segments, heads, _, queries, _ = self.sizes
        return states.view(segments, heads, queries, -1)

    def keys_by_heads(self, states: Tensor) -> Tensor:
        """Return folded keys as [segments, key heads, keys, size]."""
        segments, _, key_heads, _, keys = self.sizes
        return states.view(segments, key_heads, keys, -1)


@dataclass(frozen=True)
class HeadLayout:
    """All parts of a layer's attention, and the row among their outputs of each read token and head, [read x heads].

    Attributes:
        shares: segments have many keys in common.
    """

    parts: tuple[PartRows, ...]
    place: Tensor
    rows: int
    shares: bool

    def gathers_again(self, size: int) -> bool:
        """Return True if the backward pass gathers keys and values, so that no segment keeps its copies, for heads of `size` numbers."""
        return self.shares and self.parts[0].sizes[1] * size >= WIDE


def head_layout(
    parts: Parts, reads: Tensor | None, tokens: int, heads: int, key_heads: int, window: int | None
) -> HeadLayout | None:
    """Return the layout of a layer. It is made once a batch. None if the parts are by offsets, or do not cover all tokens.

    Args:
        reads: the tokens that have queries; None means all.
    """
    if not parts or not all(isinstance(part, Attended) for part in parts):
        return None
    found = cast(tuple[Attended, ...], parts)
    known, key = found[0].layouts, (heads, key_heads, window, reads is None)
    if key not in known:
        covered = reads is not None or sum(len(part.tokens) for part in found) == tokens
        known[key] = _laid_out(found, reads, tokens, heads, key_heads, window) if covered else None
    return cast(HeadLayout | None, known[key])


def _laid_out(
    parts: tuple[Attended, ...], reads: Tensor | None, tokens: int, heads: int, key_heads: int, window: int | None
) -> HeadLayout:
    of_heads, of_key_heads = torch.arange(heads), torch.arange(key_heads)
    place = torch.zeros(tokens, heads, dtype=torch.long)
    row = torch.arange(tokens)
    if reads is not None:
        row = torch.full((tokens,), -1).index_copy_(0, reads, torch.arange(len(reads)))
    last, start, made = (tokens if reads is None else len(reads)) * heads, 0, []
    for part in parts:
        (segments, queries), keys = part.queries.shape, part.keys.shape[1]
        # the place of a query's first head among the outputs [segments, heads, queries]
        first = start + part.real // queries * (heads * queries) + part.real % queries
        place.index_copy_(0, part.tokens, first[:, None] + of_heads * queries)
        own = torch.full((segments * queries,), -1).index_copy_(0, part.real, row.index_select(0, part.tokens))
        own = own.view(segments, 1, queries)
        of_queries = torch.where(own < 0, last, own * heads + of_heads[:, None]).flatten()
        of_keys = (part.keys[:, None] * key_heads + of_key_heads[:, None]).flatten()
        rows = slice(start, start + segments * heads * queries)
        sizes = segments, heads, key_heads, queries, keys
        made.append(PartRows(sizes, of_queries, of_keys, _bias(part, window), rows))
        start = rows.stop
    place = place if reads is None else place.index_select(0, reads)
    shares = sum(len(part.keys) for part in made) > SHARED * tokens * key_heads
    return HeadLayout(tuple(made), place.flatten(), start, shares)


def _bias(part: Attended, window: int | None) -> Tensor | None:
    mask = part.within(window)
    return None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: HeadLayout, kept: list[Tensor] | None) -> Tensor:
    """Return the outputs [read tokens x heads, size].

    Args:
        query: [read tokens x heads + 1, size], scaled; the last row is 0.
        key: [tokens x key heads, size], as `value`.
        kept: gets the tensors that `attend_backward` needs, unless None.
    """
    outputs, again = query.new_empty(layout.rows, query.shape[1]), layout.gathers_again(query.shape[1])
    if kept is not None and again:
        kept += [key, value]
    for part in layout.parts:
        queries = part.folded_queries(query.index_select(0, part.queries))
        keys, values = (part.folded_keys(states.index_select(0, part.keys)) for states in (key, value))
        own = part.folded_queries(outputs[part.rows])
        if part.is_short(query.shape[1]):
            weights = _weights(part, queries, keys)
            torch.bmm(weights, values, out=own)
            saved = [weights]
        else:
            of_heads = part.queries_by_heads(queries), *map(part.keys_by_heads, (keys, values))
            found = FORWARD(*of_heads, 0.0, part.bias is None, attn_mask=part.bias, scale=1.0)
            part.queries_by_heads(own).copy_(found[0])
            saved = [*found]
        if kept is not None:
            kept += [queries, *saved] if again else [queries, keys, values, *saved]
    return outputs.index_select(0, layout.place)


def _weights(part: PartRows, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the probabilities of the keys, [segments x key heads, heads per key head x queries, keys]."""
    segments, heads, _, count, size = part.sizes
    scores = queries.new_empty(*queries.shape[:2], size)
    bias = part.bias
    if bias is None:
        bias = torch.full((count, size), -torch.inf).triu_(1)
    scores.view(segments, heads, count, size).copy_(bias)
    return torch.softmax(scores.baddbmm_(queries, keys.mT), -1, out=scores)


def attend_backward(
    gradient: Tensor, tokens: int, layout: HeadLayout, kept: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries [read tokens x heads, size], keys and values [tokens x key heads, size].

    Args:
        gradient: of the outputs, [read tokens x heads + 1, size]; the last row is 0.
        kept: the tensors of `attend`, which are removed.
    """
    size, key_heads = gradient.shape[1], layout.parts[0].sizes[2]
    of_queries = gradient.new_empty(layout.rows, size)
    of_keys, of_values = (gradient.new_zeros(tokens * key_heads, size) for _ in range(2))
    whole = [kept.pop(0) for _ in range(2)] if layout.gathers_again(size) else []
    for part in layout.parts:
        queries = kept.pop(0)
        known = [part.folded_keys(each.index_select(0, part.keys)) for each in whole]
        keys, values = known or [kept.pop(0) for _ in range(2)]
        given = part.folded_queries(gradient.index_select(0, part.queries))
        own = part.folded_queries(of_queries[part.rows])
        back = _short_backward if part.is_short(size) else _long_backward
        found_pair = back(part, given, own, (queries, keys, values), kept)
        for total, found in zip((of_keys, of_values), found_pair, strict=True):
            total.index_add_(0, part.keys, found.reshape(-1, size))
    return of_queries.index_select(0, layout.place), of_keys, of_values


def _short_backward(
    part: PartRows, given: Tensor, own: Tensor, states: tuple[Tensor, Tensor, Tensor], kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    (queries, keys, values), weights = states, kept.pop(0)
    of_values = torch.bmm(weights.mT, given)
    of_scores = torch.bmm(given, values.mT)
    torch.ops.aten._softmax_backward_data.out(of_scores, weights, -1, weights.dtype, grad_input=of_scores)
    torch.bmm(of_scores, keys, out=own)
    return torch.bmm(of_scores.mT, queries), of_values


def _long_backward(
    part: PartRows, given: Tensor, own: Tensor, states: tuple[Tensor, Tensor, Tensor], kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    (queries, keys, values), (outputs, normaliser) = states, (kept.pop(0) for _ in range(2))
    of_queries, of_keys, of_values = BACKWARD(
        *map(part.queries_by_heads, (given, queries)),
        *map(part.keys_by_heads, (keys, values)),
        outputs,
        normaliser,
        0.0,
        part.bias is None,
        attn_mask=part.bias,
        scale=1.0,
    )
    part.queries_by_heads(own).copy_(of_queries)
    return of_keys, of_values
