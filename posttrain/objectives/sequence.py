"""Negative log-likelihood of given tokens: supervised fine-tuning, and CHORD's expert stream."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithms.specs import Phi


def negative_log_likelihood(logprobs: Tensor, phi: Phi = "none") -> Tensor:
    """Per-token phi * (-log p), same shape; phi = sg[p(1-p)] is CHORD-phi (2508.11408), `none` is plain SFT."""
    return -token_weight(logprobs, phi) * logprobs


def token_weight(logprobs: Tensor, phi: Phi) -> Tensor:
    """The weight of each expert token, without gradient."""
    if phi == "none":
        return torch.ones_like(logprobs)
    probability = logprobs.detach().exp()
    return probability * (1 - probability)
