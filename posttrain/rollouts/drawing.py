"""Choose the next token by inverting the cumulative probabilities at a uniform number that belongs to the answer.

Example:
    Probabilities 1/4 and 3/4: u = 0.2 selects the first token, u = 0.3 the second:

    >>> logits = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    >>> tokens, logprobs = draw(logits, temperature=1.0, uniform=torch.tensor([[0.2], [0.3]], dtype=torch.float64))
    >>> tokens.flatten().tolist(), [round(p, 4) for p in logprobs.exp().flatten().tolist()]
    ([0, 1], [0.25, 0.75])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.rollouts.engine import Completion, uniforms


def noise(seeds: Sequence[Sequence[int]], count: int, device: torch.device) -> Tensor:
    """Return the uniform numbers of every answer's tokens, [answers, count] float64."""
    return torch.from_numpy(np.stack([uniforms(seed, count) for seed in seeds])).to(device)


def draw(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return tokens and their log-probabilities, [batch, 1] each, from `logits` [batch, vocabulary].

    The probability of a drawn token is a float32 with full relative precision, however small, and so is its logarithm.

    Args:
        uniform: [batch, 1] in (0, 1]; None selects the most likely token.
    """
    wide = logits.float()
    probabilities = (wide / temperature if temperature not in (0.0, 1.0) else wide).softmax(-1)
    if uniform is None:
        chosen = wide.argmax(-1, keepdim=True)
    else:
        cumulated = running_sums(probabilities)
        chosen = torch.searchsorted(cumulated, uniform * cumulated[:, -1:])
        # an index past the end means that a weight is NaN; the log-probability is NaN too, and the trainer reports it
        chosen.clamp_(max=logits.shape[-1] - 1)
    return chosen, probabilities.gather(-1, chosen).log()


def running_sums(probabilities: Tensor) -> Tensor:
    """Return the cumulated probabilities in float64, [batch, vocabulary].

    PyTorch's kernel for GPUs adds in an order that may change, and refuses if only deterministic kernels are allowed. The order here is
    fixed: log2(vocabulary) additions of the row to itself, shifted by 1, 2, 4 and so on.
    """
    if probabilities.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum(-1, dtype=torch.float64)
    return _shifted_sums(probabilities.double())


def _shifted_sums(sums: Tensor) -> Tensor:
    shift = 1
    while shift < sums.shape[-1]:
        sums = torch.cat([sums[:, :shift], sums[:, shift:] + sums[:, :-shift]], -1)
        shift *= 2
    return sums


def completion(tokens: Sequence[int], logprobs: Sequence[float], ends: Sequence[int]) -> Completion:
    """Return the drawn tokens up to the first of `ends`, if one was drawn."""
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    finished = end is not None
    length = len(tokens) if end is None else end + 1
    return Completion(tuple(tokens[:length]), tuple(logprobs[:length]), finished)
