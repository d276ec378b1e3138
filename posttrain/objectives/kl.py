"""Estimators of KL(policy || other) from samples of the policy (J. Schulman, "Approximating KL divergence", 2020)."""

from __future__ import annotations

import math

from torch import Tensor

from posttrain.algorithms.specs import KlEstimator
from posttrain.objectives.reduce import LOG_RATIO_LIMIT


def kl_estimate(logprobs: Tensor, other: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate with d = logprobs - other, same shape: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    For losses: k3 bounds d, so that one token that `other` holds for impossible cannot overflow the gradient.
    """
    difference = logprobs - other
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return _k3(difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def kl_metric(logprobs: Tensor, other: Tensor) -> Tensor:
    """Per-token k3 in float64, never clamped: what is reported, and no part of a loss."""
    return _k3(logprobs.detach().double() - other.double())


def _k3(difference: Tensor) -> Tensor:
    # expm1, because exp(-d) - 1 loses every digit of a small d in float32
    return (-difference).expm1() + difference


def adapted_coefficient(coefficient: float, observed: float, target: float, responses: int, horizon: int) -> float:
    """The coefficient after `responses` responses of mean KL `observed`, steered to `target` (1909.08593, section 2.2).

    It changes by a fifth of itself at most, however many responses a step has, so that its sign stays; and by nothing where the
    KL is NaN, which is the update's to report.
    """
    if math.isnan(observed):
        return coefficient
    error = min(max(observed / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(responses / horizon, 1.0))
