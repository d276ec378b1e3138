"""Negative log-likelihood of given tokens, for supervised fine-tuning and CHORD's expert stream.

Example:
    At p = 1/2 the weight p(1-p) of CHORD-phi is 1/4:

    >>> logprobs = torch.tensor([0.5]).log()
    >>> [round(float(negative_log_likelihood(logprobs, phi)), 4) for phi in ("none", "p_one_minus_p")]
    [0.6931, 0.1733]
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithms.axes import Phi


def negative_log_likelihood(logprobs: Tensor, phi: Phi = "none") -> Tensor:
    """Return per-token phi * (-log p), same shape; phi = sg[p(1-p)] is CHORD-phi (2508.11408), `none` is plain SFT."""
    return -token_weight(logprobs, phi) * logprobs


def token_weight(logprobs: Tensor, phi: Phi) -> Tensor:
    """Return the weight of each expert token, without gradient."""
    if phi == "none":
        return torch.ones_like(logprobs)
    probability = logprobs.detach().exp()
    return probability * (1 - probability)
