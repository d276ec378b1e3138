"""Estimators of KL(policy || other) from samples of the policy (J. Schulman, "Approximating KL divergence", 2020).

Example:
    With d = log 2: k1 = 0.693, k2 = 0.240, k3 = 1/2 - 1 + 0.693 = 0.193

    >>> import torch
    >>> d = torch.tensor([2.0]).log()
    >>> [round(float(kl_estimate(d, torch.zeros(1), k)), 3) for k in ("k1", "k2", "k3")]
    [0.693, 0.24, 0.193]
"""

from __future__ import annotations

import math

from torch import Tensor

from posttrain.algorithms.axes import KlEstimator
from posttrain.objectives.reduce import LOG_RATIO_LIMIT


def kl_estimate(logprobs: Tensor, other: Tensor, estimator: KlEstimator) -> Tensor:
    """Return the per-token estimate with d = logprobs - other: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.

    For use in losses: k3 clamps d from below, where exp(-d) would overflow; a token that `other` finds impossible keeps its gradient.
    """
    difference = logprobs - other
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return _k3(difference.clamp(min=-LOG_RATIO_LIMIT))


def kl_metric(logprobs: Tensor, other: Tensor) -> Tensor:
    """Return per-token k3 in float64, never clamped. For reporting only, not for losses."""
    return _k3(logprobs.detach().double() - other.double())


def _k3(difference: Tensor) -> Tensor:
    # expm1, because exp(-d) - 1 loses every digit of a small d in float32
    return (-difference).expm1() + difference


def adapted_coefficient(coefficient: float, observed: float, target: float, responses: int, horizon: int) -> float:
    """Return the coefficient after `responses` responses of mean KL `observed`, steered to `target` (1909.08593, section 2.2).

    It changes by at most a fifth, however many responses a step has, so its sign is kept. It does not change if the KL is NaN; the trainer
    reports NaN.
    """
    if math.isnan(observed):
        return coefficient
    error = min(max(observed / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(responses / horizon, 1.0))
