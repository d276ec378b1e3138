"""SAPO's gate, GMPO's geometric mean and DPPO's trust region: numbers by hand, slopes, and tokens outside the mask."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.trust_region import (
    binary_divergence,
    divergence_loss,
    geometric_loss,
    soft_gate_loss,
)

NAN = math.nan


def f64(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("ratio", "advantage"), [(1.0, 2.0), (1.0, -2.0), (1.7, 0.5), (0.4, -1.5), (6.0, -1.0)])
def test_the_soft_gate_by_hand(ratio: float, advantage: float) -> None:
    rho, tau = f64([[ratio]]).requires_grad_(), 1.0 if advantage > 0 else 1.05
    result = soft_gate_loss(rho, f64([[advantage]]), 1.0, 1.05)
    (slope,) = torch.autograd.grad(result.loss.sum(), rho)
    p = sigmoid(tau * (ratio - 1))
    assert result.loss.item() == pytest.approx(-advantage * 4 / tau * p, abs=1e-12)
    # the weight 4 p (1 - p) is 1 at ratio 1, and falls on both sides
    assert slope.item() == pytest.approx(-advantage * 4 * p * (1 - p), abs=1e-12)
    assert not (result.clipped_low | result.clipped_high).any()


def test_tokens_with_a_negative_advantage_lose_their_gradient_sooner() -> None:
    rho = f64([[3.0, 3.0]]).requires_grad_()
    (slope,) = torch.autograd.grad(soft_gate_loss(rho, f64([[1.0, -1.0]]), 1.0, 1.05).loss.sum(), rho)
    assert abs(slope[0, 1]) < abs(slope[0, 0])


def test_the_geometric_mean_clips_each_token_on_the_side_of_its_advantage() -> None:
    old = f64([[-1.0, -1.0, -1.0], [-1.0, -1.0, NAN], [-1.0, -1.0, -1.0]])
    lp = f64([[-0.3, -1.9, -0.9], [-0.3, -1.9, NAN], [-1.0, -1.0, -1.0]]).requires_grad_()
    mask = torch.tensor([[True] * 3, [True, True, False], [True] * 3])
    advantage = f64([[2.0] * 3, [-3.0, -3.0, NAN], [0.7] * 3])
    result = geometric_loss(lp, old, advantage, mask, 0.4, 0.4)
    # A > 0: log-ratios 0.7, -0.9, 0.1 become 0.4, -0.9, 0.1; A < 0: 0.7, -0.9 become 0.7, -0.4
    up, down = math.exp((0.4 - 0.9 + 0.1) / 3), math.exp((0.7 - 0.4) / 2)
    assert result.loss[0].tolist() == pytest.approx([-2 * up] * 3, abs=1e-12)
    assert result.loss[1, :2].tolist() == pytest.approx([3 * down] * 2, abs=1e-12)
    assert result.loss[2].tolist() == pytest.approx([-0.7] * 3, abs=1e-12)
    assert result.clipped_high.tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert result.clipped_low[1].tolist() == [False, True, False]
    means = torch.where(mask, result.loss, 0.0).sum(-1) / mask.sum(-1)
    (slope,) = torch.autograd.grad(means.sum(), lp)
    # a clipped token has no gradient; the others share the gradient of the mean
    assert slope[0].tolist() == pytest.approx([0.0, -2 * up / 3, -2 * up / 3], abs=1e-12)
    assert slope[1].tolist() == pytest.approx([3 * down / 2, 0.0, 0.0], abs=1e-12)


def test_binary_divergences_by_hand() -> None:
    old, new = f64([[0.2, 0.9]]).log(), f64([[0.5, 0.6]]).log()
    assert binary_divergence(new, old, "tv")[0].tolist() == pytest.approx([0.3, 0.3], abs=1e-12)
    expected = [
        0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5),
        0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4),
    ]
    assert binary_divergence(new, old, "kl")[0].tolist() == pytest.approx(expected, abs=1e-12)
    # a token of probability 1 on either side, and one that is all but impossible
    edge = binary_divergence(f64([[0.0, -1.0, -900.0]]), f64([[-1.0, 0.0, -1.0]]), "kl")
    assert torch.isfinite(edge).all()
    assert (edge > 0).all()


@pytest.mark.parametrize(
    ("old", "new", "advantage", "low", "high"),
    [
        (0.2, 0.5, 1.0, False, True),  # up by 0.3 in the direction of A
        (0.2, 0.5, -1.0, False, False),  # up against A: nothing holds it back
        (0.2, 0.3, 1.0, False, False),  # inside, although the ratio is 1.5
        (0.001, 0.01, 1.0, False, False),  # a ratio of 10 that a clip would have stopped
        (0.9, 0.6, -1.0, True, False),
        (0.9, 0.6, 1.0, False, False),
    ],
)
def test_only_tokens_that_leave_the_trust_region_are_dropped(
    old: float, new: float, advantage: float, low: bool, high: bool
) -> None:
    lp = f64([[new]]).log().requires_grad_()
    result = divergence_loss(lp, f64([[old]]).log(), f64([[advantage]]), "tv", 0.2, 0.2)
    (slope,) = torch.autograd.grad(result.loss.sum(), lp)
    expected = 0.0 if low or high else -advantage * new / old
    assert (result.clipped_low.item(), result.clipped_high.item()) == (low, high)
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert slope.item() == pytest.approx(expected, abs=1e-12)
