"""How far a sampler's log-probabilities may be from the policy's with the same weights.

Example:
    >>> FLOAT32.mean < BFLOAT16.mean
    True
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference between sampler and policy in nats: the mean over the probe's tokens, and the largest."""

    mean: float
    largest: float


FLOAT32 = Tolerance(2e-3, 2e-2)
BFLOAT16 = Tolerance(0.1, 1.0)
"""Rounding in bfloat16 gives 0.05 on average; other weights give 1 or more."""
