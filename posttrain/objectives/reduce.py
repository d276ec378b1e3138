"""Masked sums and three aggregations of token losses. Denominators are never applied here.

Example:
    Rows of 1 and 2 tokens: token_mean sums all tokens, sequence_mean sums the row means:

    >>> values, mask = torch.tensor([[1.0, 9.0], [2.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    >>> float(aggregate(values, mask, "token_mean", 2)), float(aggregate(values, mask, "sequence_mean", 2))
    (7.0, 4.0)
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithms.axes import Aggregate

# exp() of a clamped log-ratio stays finite in float32, far beyond any ratio that a clip lets through
LOG_RATIO_LIMIT = 20.0


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `values` [batch, time] under `mask` [batch, time]. torch.where, because NaN * 0 is NaN."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_extremes(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of `values` under `mask`; inf and -inf if it is empty.

    The values are filled in rather than selected, because a selection by a boolean mask makes a GPU wait.
    """
    return values.masked_fill(~mask, torch.inf).min(), values.masked_fill(~mask, -torch.inf).max()


def row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Return per-row sums [batch] of `values` [batch, time] under `mask`."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(-1)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Return per-row means [batch]; 0 for a fully masked row."""
    return row_sums(values, mask) / mask.sum(-1).clamp(min=1)


def aggregate(values: Tensor, mask: Tensor, how: Aggregate, max_length: int) -> Tensor:
    """Return the numerator of a token loss [batch, time]; the trainer divides it by the count that `denominator(how)` names.

    token_mean: sum over tokens / tokens. sequence_mean: sum of row means / sequences.
    constant: sum over tokens / (sequences * max_length), 2503.20783.
    """
    if how == "token_mean":
        return masked_sum(values, mask)
    if how == "sequence_mean":
        return row_means(values, mask).sum()
    return masked_sum(values, mask) / max_length


def denominator(how: Aggregate) -> str:
    """Return the name of the count that divides `aggregate`: `tokens`, or `sequences` with at least one token in the mask."""
    return "tokens" if how == "token_mean" else "sequences"
