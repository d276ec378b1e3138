"""Choosing the next token: the inverse of the cumulated probabilities at a number that belongs to the answer alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.rollouts.engine import Completion, uniforms


def noise(seeds: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
    """Uniform numbers of every answer's tokens, [answers, count] float64."""
    return torch.from_numpy(np.stack([uniforms(seed, count) for seed in seeds])).to(device)


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities, [batch, 1] each, of `logits` [batch, vocabulary].

    uniform: [batch, 1] in (0, 1]; without it the likeliest token is taken.
    The probability of the token that was taken is a float32 of full relative precision, however small, and so is its logarithm.
    """
    wide = logits.float()
    probabilities = (wide / temperature if temperature not in (0.0, 1.0) else wide).softmax(-1)
    if uniform is None:
        chosen = wide.argmax(-1, keepdim=True)
    else:
        cumulated = probabilities.cumsum(-1, dtype=torch.float64)
        chosen = torch.searchsorted(cumulated, uniform * cumulated[:, -1:])
        # past the end only where a weight is NaN: then the log-probability is NaN, which the trainer reports
        chosen.clamp_(max=logits.shape[-1] - 1)
    return chosen, probabilities.gather(-1, chosen).log()


def completion(tokens: Sequence[int], logprobs: Sequence[float], eos_id: int) -> Completion:
    """What was drawn up to the end of sequence, if it was drawn at all."""
    finished = eos_id in tokens
    length = tokens.index(eos_id) + 1 if finished else len(tokens)
    return Completion(tuple(tokens[:length]), tuple(logprobs[:length]), finished)
