"""Reward shaping by length, and CHORD's schedule, as pure functions of numbers.

Example:
    >>> overlong_penalty(torch.tensor([50, 90, 110]), max_length=100, cache=20).tolist()
    [-0.0, -0.5, -1.0]
    >>> from posttrain.algorithms.chord import CHORD, scheduled
    >>> spec = scheduled(CHORD, updates=40)
    >>> spec.mu_decay_steps, expert_weight(0, spec), round(expert_weight(15, spec), 3), expert_weight(30, spec)
    (30, 0.9, 0.475, 0.05)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posttrain.algorithms.specs import OnPolicy


def overlong_penalty(lengths: Tensor, max_length: int, cache: float) -> Tensor:
    """Return the soft overlong penalty [batch] (2503.14476, eq. 13).

    It is 0 up to max_length - cache, then falls linearly to -1 at max_length. Lengths are in tokens.
    """
    over = (lengths - (max_length - cache)).to(torch.float32)
    return -(over / cache).clamp(0.0, 1.0)


def expert_weight(step: int, spec: OnPolicy) -> float:
    """Return CHORD's mu at optimiser step `step` (2508.11408): linear warm-up 0 -> peak, cosine peak -> valley, then constant."""
    decay = spec.mu_decay_steps
    assert decay is not None, "see `scheduled`"
    if step < spec.mu_warmup_steps:
        return spec.mu_peak * step / spec.mu_warmup_steps
    decayed = step - spec.mu_warmup_steps
    if decayed >= decay:
        return spec.mu_valley
    cosine = 0.5 * (1 + math.cos(math.pi * decayed / decay))
    return spec.mu_valley + (spec.mu_peak - spec.mu_valley) * cosine
