"""Attention by offsets written out with whole score matrices, in the signature of `torch_attn::_varlen_attn` since PyTorch 2.11.

It computes on any device and in any dtype, so the merge, the offsets and the gradient can be checked without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from posttrain.models.varlen import Kernel


def forward(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, longest_query: int, longest_key: int,
    causal: bool, scale: float | None, window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs [queries, heads, size], log-sum-exp [heads, queries], and an empty state."""
    assert causal == (window == [-1, 0])
    output = torch.zeros_like(query)
    normaliser = query.new_zeros(query.shape[1], query.shape[0])
    for q, k in segments(query_starts, key_starts, longest_query, longest_key):
        scores = _scores(query[q], key[k], window, scale)
        normaliser[:, q] = scores.logsumexp(-1)
        output[q] = (scores.softmax(-1) @ _heads(value[k], query)).transpose(0, 1)
    return output, normaliser, torch.zeros(2, dtype=torch.uint64)


def backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, normaliser: Tensor, query_starts: Tensor,
    key_starts: Tensor, longest_query: int, longest_key: int, causal: bool, state: Tensor, scale: float | None, window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients as FlashAttention computes them: from the given outputs and log-sum-exp (2205.14135, algorithm 4)."""
    found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    repeats = query.shape[1] // key.shape[1]
    for q, k in segments(query_starts, key_starts, longest_query, longest_key):
        probabilities = (_scores(query[q], key[k], window, scale) - normaliser[:, q, None]).exp()
        outer = gradient[q].transpose(0, 1)
        delta = (outer * output[q].transpose(0, 1)).sum(-1, keepdim=True)
        of_scores = probabilities * (outer @ _heads(value[k], query).transpose(1, 2) - delta) * factor
        found[0][q] = (of_scores @ _heads(key[k], query)).transpose(0, 1)
        for part, each in zip(
            found[1:],
            (of_scores.transpose(1, 2) @ query[q].transpose(0, 1), probabilities.transpose(1, 2) @ outer),
            strict=True,
        ):
            part[k] += each.transpose(0, 1).unflatten(1, (-1, repeats)).sum(2)
    return found


REFERENCE = Kernel(forward, backward)


def segments(
    query_starts: Tensor, key_starts: Tensor, longest_query: int, longest_key: int
) -> Iterator[tuple[slice, slice]]:
    q, k = query_starts.tolist(), key_starts.tolist()
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert longest_query == max(b - a for a, b in pairwise(q))
    assert longest_key == max(b - a for a, b in pairwise(k))
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _heads(states: Tensor, query: Tensor) -> Tensor:
    """Return [heads, tokens, size], with the heads of grouped keys repeated."""
    return states.repeat_interleave(query.shape[1] // states.shape[1], 1).transpose(0, 1)


def _scores(query: Tensor, key: Tensor, window: list[int], scale: float | None) -> Tensor:
    """Return scores; a query sees window[0] keys before its place and window[1] behind it, all if negative. The last ones are aligned."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.transpose(0, 1) @ _heads(key, query).transpose(1, 2) * factor
    queries, keys = scores.shape[1:]
    away = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    for hidden, limit in ((away > window[0], window[0]), (-away > window[1], window[1])):
        if limit >= 0:
            scores = scores.masked_fill(hidden, -torch.inf)
    return scores
