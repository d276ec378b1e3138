"""Reward shaping by length and by a missing end of sequence, and CHORD's schedule: pure functions of numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posttrain.algorithms.specs import OnPolicy


def overlong_penalty(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """Soft overlong punishment [batch] (2503.14476, eq. 13): 0 up to max_length - cache, then linear down to -1 at max_length."""
    over = (lengths - (max_length - cache)).to(torch.float32)
    return -(over / cache).clamp(0.0, 1.0)


def expert_weight(step: int, spec: OnPolicy) -> float:
    """CHORD's mu at optimiser step `step` (2508.11408): linear warm-up 0 -> peak, cosine peak -> valley, then constant."""
    if step < spec.mu_warmup_steps:
        return spec.mu_peak * step / spec.mu_warmup_steps
    decayed = step - spec.mu_warmup_steps
    if decayed >= spec.mu_decay_steps:
        return spec.mu_valley
    cosine = 0.5 * (1 + math.cos(math.pi * decayed / spec.mu_decay_steps))
    return spec.mu_valley + (spec.mu_peak - spec.mu_valley) * cosine
