"""Generalised advantage estimation against an independent recursion, whitening, and the clipped value loss."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.gae import gae, value_loss, whiten

NAN = math.nan


def f64(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


REWARDS = f64([[0.1, -0.2, 1.0], [0.0, 2.0, NAN]])
VALUES = f64([[0.3, 0.5, 0.4], [1.0, -1.0, NAN]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, the value after the last token being 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_the_recursion_is_the_definition(gamma: float, lam: float) -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma, lam)
    first = by_definition([0.1, -0.2, 1.0], [0.3, 0.5, 0.4], gamma, lam)
    second = by_definition([0.0, 2.0], [1.0, -1.0], gamma, lam)
    assert advantages[0].tolist() == pytest.approx(first, abs=1e-12)
    assert advantages[1].tolist() == pytest.approx([*second, 0.0], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([a + v for a, v in zip(first, [0.3, 0.5, 0.4], strict=True)], abs=1e-12)
    assert returns[1, 2].item() == 0.0


def test_lambda_one_is_return_minus_value_and_lambda_zero_the_td_error() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, 1.0, 1.0)
    assert advantages[0].tolist() == pytest.approx([0.9 - 0.3, 0.8 - 0.5, 1.0 - 0.4], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.9, 0.8, 1.0], abs=1e-12)
    td, _ = gae(REWARDS, VALUES, MASK, 1.0, 0.0)
    assert td[0].tolist() == pytest.approx([0.1 + 0.5 - 0.3, -0.2 + 0.4 - 0.5, 1.0 - 0.4], abs=1e-12)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_inserted_masked_tokens_change_nothing(where: int) -> None:
    rewards, values = [0.1, -0.2, 1.0], [0.3, 0.5, 0.4]
    plain, _ = gae(f64([rewards]), f64([values]), torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8)
    longer, returns = gae(
        f64([[*rewards[:where], NAN, 77.0, *rewards[where:]]]),
        f64([[*values[:where], -5.0, NAN, *values[where:]]]),
        torch.tensor([[True] * where + [False, False] + [True] * (3 - where)]),
        0.9,
        0.8,
    )
    kept = [i for i in range(5) if i not in (where, where + 1)]
    assert longer[0, kept].tolist() == pytest.approx(plain[0].tolist(), abs=1e-12)
    assert longer[0, [where, where + 1]].tolist() == returns[0, [where, where + 1]].tolist() == [0.0, 0.0]


def test_whitening_has_mean_0_and_std_1_over_the_mask_alone() -> None:
    values = f64([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    std = math.sqrt((4 + 1 + 9) / 3)
    assert whiten(values, mask)[mask].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std], abs=1e-8)
    assert (whiten(values, mask)[~mask] == 0).all()
    assert whiten(values, torch.zeros_like(mask)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("constant", [0.1, 1e3 + 0.1, 1e6 + 0.1])
def test_equal_values_are_exactly_zero_when_whitened(constant: float) -> None:
    values, mask = torch.full((3, 7), constant), torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    assert not whiten(values, mask).any()


def test_value_loss_by_hand() -> None:
    values, old, returns = f64([[1.0, 1.0, 0.1]]), f64([[0.0, 0.9, 0.0]]), f64([[2.0, 2.0, -1.0]])
    # clipped values .2, 1, .1: the first is held back, the others are inside the clip
    expected = [0.5 * max(1.0, 1.8**2), 0.5, 0.5 * 1.1**2]
    assert value_loss(values, old, returns, 0.2)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_an_endless_value_clip_is_half_the_squared_error() -> None:
    generator = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(2, 5, generator=generator, dtype=torch.float64) * 9 for _ in range(3))
    assert torch.allclose(value_loss(values, old, returns, math.inf), 0.5 * (values - returns) ** 2, atol=1e-12)


def test_value_loss_has_no_gradient_where_the_clip_holds() -> None:
    values = f64([[1.0, 0.05]]).requires_grad_()
    value_loss(values, f64([[0.0, 0.0]]), f64([[2.0, 2.0]]), 0.2).sum().backward()
    # the first moved further than the clip: the clipped branch is the greater error, and it is flat
    assert values.grad[0].tolist() == pytest.approx([0.0, 0.05 - 2.0])
