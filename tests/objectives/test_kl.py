"""KL estimators by exact sums over a small vocabulary, and the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.kl import adapted_coefficient, kl_estimate, kl_metric

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
OTHER = torch.tensor([-0.4, 0.5, 1.0, 0.2, -2.0], dtype=torch.float64)


def exact(logits: torch.Tensor) -> torch.Tensor:
    p, q = logits.log_softmax(-1), OTHER.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_is_the_kl(estimator: str) -> None:
    p, q = LOGITS.log_softmax(-1), OTHER.log_softmax(-1)
    assert (p.exp() * kl_estimate(p, q, estimator)).sum().item() == pytest.approx(exact(LOGITS).item(), abs=1e-12)


def test_by_hand() -> None:
    p, q = torch.tensor([-1.0], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    assert kl_estimate(p, q, "k1").item() == 0.5
    assert kl_estimate(p, q, "k2").item() == 0.125
    assert kl_estimate(p, q, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5, abs=1e-15)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_zero_at_equality(estimator: str) -> None:
    d = torch.linspace(-30, 30, 600, dtype=torch.float64)
    assert (kl_estimate(d, torch.zeros_like(d), estimator) > 0).all()
    assert kl_estimate(torch.zeros(1), torch.zeros(1), estimator).item() == 0.0


@pytest.mark.parametrize("d", [1e-3, -1e-3, 1e-2, 0.5])
def test_k3_is_right_for_small_differences_in_float32(d: float) -> None:
    value = kl_estimate(torch.tensor([d]), torch.zeros(1), "k3").item()
    assert value == pytest.approx(math.expm1(-d) + d, rel=2e-3)


def test_k1_is_never_clamped_and_k3_stays_finite() -> None:
    far = torch.tensor([-300.0, 300.0])
    assert kl_estimate(far, torch.zeros(2), "k1").tolist() == [-300.0, 300.0]
    assert torch.isfinite(kl_estimate(far, torch.zeros(2), "k3")).all()
    ratio = torch.tensor([25.0, 300.0], requires_grad=True)
    kl_estimate(ratio, torch.zeros(2), "k3").sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == pytest.approx([1.0, 1.0])  # 1 - exp(-d), also beyond the limit


def test_the_metric_is_k3_and_never_clamped() -> None:
    p, q = torch.tensor([-1.0, -2.0, -30.0]), torch.tensor([-1.5, -62.0, -1.0])
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(-60) - 1 + 60, math.exp(29) - 1 - 29]
    assert kl_metric(p, q).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_expected_gradient_of_k2_is_that_of_the_kl() -> None:
    logits = LOGITS.clone().requires_grad_()
    p = logits.log_softmax(-1)
    estimate = (p.detach().exp() * kl_estimate(p, OTHER.log_softmax(-1), "k2")).sum()
    (expected,) = torch.autograd.grad(exact(logits), logits)
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert torch.allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_agree_with_finite_differences(estimator: str) -> None:
    p = LOGITS.log_softmax(-1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, OTHER.log_softmax(-1), estimator), (p,))


def test_the_adaptive_coefficient_steers_and_is_bounded() -> None:
    # observed = target: unchanged; 10 % above: + 1 % after a tenth of the horizon; far off: bounded at 20 %
    assert adapted_coefficient(0.05, 6.0, 6.0, 64, 1000) == 0.05
    assert adapted_coefficient(0.05, 6.6, 6.0, 100, 1000) == pytest.approx(0.05 * 1.01)
    assert adapted_coefficient(0.05, 600.0, 6.0, 100, 1000) == pytest.approx(0.05 * 1.02)
    assert adapted_coefficient(0.05, 0.0, 6.0, 100, 1000) == pytest.approx(0.05 * 0.98)
    # a step of ten horizons does not turn the sign, and a KL that is not known changes nothing
    assert adapted_coefficient(0.05, 0.0, 6.0, 10_000, 1000) == pytest.approx(0.05 * 0.8)
    assert adapted_coefficient(0.05, 600.0, 6.0, 10_000, 1000) == pytest.approx(0.05 * 1.2)
    assert adapted_coefficient(0.05, math.nan, 6.0, 100, 1000) == 0.05
