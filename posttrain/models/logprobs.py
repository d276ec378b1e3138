"""Log-probabilities and entropy of given tokens without the [tokens, vocabulary] matrix of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25
"""Logits held at once; float32 makes it 128 MiB."""


def taken_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy in nats), both [tokens] float32, of softmax(hidden @ weight.T / temperature).

    hidden: [tokens, hidden]. weight: [vocabulary, hidden]. targets: [tokens]. temperature: one, or [tokens]. The entropy carries no
    gradient. Chunks of rows are recomputed in the backward pass, so memory does not grow with tokens x vocabulary.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=hidden.device).expand(len(hidden))
    if len(hidden) <= rows:
        return _chunk(hidden, weight, bias, targets, temperature)
    parts = [
        checkpoint(
            _chunk,
            hidden[i : i + rows],
            weight,
            bias,
            targets[i : i + rows],
            temperature[i : i + rows],
            use_reentrant=False,
        )
        for i in range(0, len(hidden), rows)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    # at least float32; float64 stays, so that identities can be tested to 1e-10
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits / temperature[:, None].to(logits.dtype)
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy
