"""Attention by offsets for a CPU, with the signature of FlashAttention's `flash_attn_varlen_func`, which has no build for one.

Example:
    A segment of two tokens that attend to themselves, and one token that attends to all three of its sequence:

    >>> states = torch.zeros(3, 1, 1), torch.zeros(5, 1, 1), torch.tensor([1.0, 2, 3, 4, 8])[:, None, None]
    >>> offsets = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 5])
    >>> varlen_attention(*states, *offsets, 2, 3, softmax_scale=1.0, causal=True, window_size=(-1, -1)).flatten().tolist()
    [1.0, 1.5, 5.0]
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """Return causal attention [tokens, heads, size] of every segment to its keys, aligned at their ends.

    Segments of equal lengths are one call of SDPA, which takes its fused CPU kernel.
    """
    if not causal or window_size != (-1, -1):
        raise ValueError(f"causal={causal}, window_size={window_size}: only full causal attention is needed")
    lengths = [[stop - start for start, stop in pairwise(at.tolist())] for at in (query_offsets, key_offsets)]
    queries, keys, values = query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1])
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, shape in enumerate(zip(*lengths, strict=True)):
        by_shape.setdefault(shape, []).append(number)
    outputs: list[Any] = [None] * len(queries)
    for (new, known), members in by_shape.items():
        rows = (torch.stack([part[i] for i in members]).transpose(1, 2) for part in (queries, keys, values))
        mask = None if new == known else _aligned_at_the_end(new, known)
        found = scaled_dot_product_attention(*rows, mask, is_causal=mask is None, scale=softmax_scale, enable_gqa=True)
        for i, output in zip(members, found.transpose(1, 2).unbind(), strict=True):
            outputs[i] = output
    return torch.cat(outputs)


@lru_cache(maxsize=4096)
def _aligned_at_the_end(new: int, known: int) -> Tensor:
    """Return the boolean mask [new, known] of `new` queries that are the last of `known` tokens."""
    return torch.ones(new, known, dtype=torch.bool).tril(known - new)
