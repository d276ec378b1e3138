"""Log-probabilities and entropy of given tokens, fused with the language model's head: [tokens, vocabulary] never exists at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24
"""Logits held at once; float32 makes it 64 MiB."""


def taken_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(log p(target), entropy in nats), both [tokens] float32, of softmax(hidden @ weight.T / temperature).

    hidden: [tokens, hidden]. weight: [vocabulary, hidden]. targets: [tokens]. temperature: one, or [tokens]. The entropy carries no
    gradient. The head's product is taken in autocast's type, the softmax in float32 at least (float64 stays).
    """
    kind = hidden.device.type
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    logprobs, entropy = _TakenLogprobs.apply(hidden, weight, bias, targets, temperature, product)
    return logprobs, entropy


class _TakenLogprobs(torch.autograd.Function):
    """Chunks of tokens, whose logits the backward pass computes again: d log p(y) / d logits = onehot(y) - p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        product: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(product, torch.float32)
        logprobs, entropy = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
        head = _Head(weight, bias, temperature, product)
        for rows in head.chunks(len(hidden)):
            table = head.logits(hidden, rows).log_softmax(-1, dtype=wide)
            logprobs[rows] = table.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(table.exp(), table)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.product = temperature, product
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head, wide = _Head(weight, bias, ctx.temperature, ctx.product), outer.dtype
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        scaled_outer = (outer / ctx.temperature).to(wide)
        for rows in head.chunks(len(hidden)):
            scaled = scaled_outer[rows, None]
            of_logits = head.logits(hidden, rows).softmax(-1, dtype=wide).mul_(-scaled)
            of_logits.scatter_add_(-1, targets[rows, None], scaled)
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            narrow = of_logits.to(ctx.product)
            of_hidden[rows] = (narrow @ head.weight).to(hidden.dtype)
            if of_weight is not None:
                of_weight += narrow.T @ hidden[rows].to(ctx.product)
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


class _Head:
    """The head's matrix in the type that products are taken in."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, product: torch.dtype) -> None:
        self.weight, self.bias = weight.to(product), None if bias is None else bias.to(product)
        self.temperature = temperature

    def chunks(self, tokens: int) -> list[slice]:
        rows = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return [slice(i, i + rows) for i in range(0, tokens, rows)]

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """[tokens, vocabulary] over the temperature: as the product gives them, or in float32 where they are divided."""
        logits = torch.nn.functional.linear(hidden[rows].to(self.weight.dtype), self.weight, self.bias)
        if isinstance(self.temperature, float) and self.temperature == 1:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        divisor = (
            self.temperature[rows, None].to(logits.dtype) if isinstance(self.temperature, Tensor) else self.temperature
        )
        return logits.div_(divisor)
