"""Masked sums and the three aggregates, with the arithmetic written out."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.reduce import aggregate, denominator, masked_extremes, masked_sum, row_means, row_sums

NAN = math.nan
VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


def test_sums_and_means_by_hand_with_nan_outside_the_mask() -> None:
    assert masked_sum(VALUES, MASK).item() == 10.0
    assert row_sums(VALUES, MASK).tolist() == [6.0, 4.0, 0.0]
    assert row_means(VALUES, MASK).tolist() == [2.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("how", "numerator", "count"),
    [("token_mean", 10.0, "tokens"), ("sequence_mean", 6.0, "sequences"), ("constant", 10.0 / 8, "sequences")],
)
def test_aggregates_are_numerators(how: str, numerator: float, count: str) -> None:
    assert aggregate(VALUES, MASK, how, 8).item() == numerator
    assert denominator(how) == count


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
def test_a_fully_masked_batch_is_zero_with_a_graph_and_nan_never_leaks_into_the_gradient(how: str) -> None:
    values = VALUES.clone().requires_grad_()
    nothing = aggregate(values, torch.zeros_like(MASK), how, 8)
    assert nothing.item() == 0.0
    nothing.backward()
    assert values.grad is not None
    assert values.grad.abs().sum().item() == 0.0
    values.grad = None
    aggregate(values, MASK, how, 8).backward()
    assert torch.isfinite(values.grad).all()
    assert (values.grad[~MASK] == 0).all()


def test_equal_lengths_make_token_mean_equal_sequence_mean() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.isclose(aggregate(values, mask, "token_mean", 9) / 12, aggregate(values, mask, "sequence_mean", 9) / 3)


def test_full_lengths_make_the_constant_equal_sequence_mean() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.isclose(aggregate(values, mask, "constant", 4), aggregate(values, mask, "sequence_mean", 4))


def test_extremes_are_those_under_the_mask() -> None:
    values = torch.tensor([[1.0, 9.0], [-5.0, 4.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert [float(end) for end in masked_extremes(values, mask)] == [1.0, 4.0]
    assert [float(end) for end in masked_extremes(values, torch.zeros_like(mask))] == [math.inf, -math.inf]
    values[0, 0] = math.nan
    assert all(math.isnan(float(end)) for end in masked_extremes(values, mask))
