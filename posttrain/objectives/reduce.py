"""Masked sums and the three ways to aggregate token losses. Denominators are never applied here."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithms.specs import Aggregate

# exp() of a clamped log-ratio stays finite in float32, far beyond any ratio that a clip lets through
LOG_RATIO_LIMIT = 20.0


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` [batch, time] where `mask` [batch, time] is true. torch.where, because NaN * 0 is NaN."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Per-row sums [batch] of `values` [batch, time] under `mask`."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(-1)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Per-row means [batch]; 0 for a fully masked row."""
    return row_sums(values, mask) / mask.sum(-1).clamp(min=1)


def aggregate(values: Tensor, mask: Tensor, how: Aggregate, max_length: int) -> Tensor:
    """The numerator of a token loss [batch, time]; divide by the global count that `denominator(how)` names.

    token_mean: sum over tokens / tokens. sequence_mean: sum of row means / sequences.
    constant: sum over tokens / (sequences * max_length), 2503.20783.
    """
    if how == "token_mean":
        return masked_sum(values, mask)
    if how == "sequence_mean":
        return row_means(values, mask).sum()
    return masked_sum(values, mask) / max_length


def denominator(how: Aggregate) -> str:
    """Name of the count that divides `aggregate`: `tokens`, or `sequences` that have at least one token in the mask."""
    return "tokens" if how == "token_mean" else "sequences"
