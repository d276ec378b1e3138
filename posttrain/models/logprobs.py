"""Log-probabilities and entropy of given tokens, fused with the language model's head: [tokens, vocabulary] never exists.

The softmax is taken online over tiles of tokens x vocabulary that stay in the processor's cache (the scheme of 2411.09009, which keeps
them on the chip); the backward pass makes each tile again from the kept normaliser, so that each part of the head's gradient is written
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

TILE_ELEMENTS, TILE_WORDS = 2**21, 4096
"""Most logits of a tile, 8 MiB of float32, and most of its words of the vocabulary."""


def selected_logprobs(
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
    """d log p(y) / d logits = onehot(y) - p, tile by tile."""

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
        head = _Head(hidden, weight, bias, temperature, product)
        logprobs, entropy, normaliser = (
            torch.empty(len(hidden), dtype=head.wide, device=hidden.device) for _ in range(3)
        )
        for rows in head.rows:
            taken, greatest = (hidden.new_zeros(targets[rows].shape, dtype=head.wide) for _ in range(2))
            greatest -= torch.inf
            total, weighted = torch.zeros_like(taken), torch.zeros_like(taken)
            for words in head.words:
                logits = head.logits(rows, words)
                inside, column = _within(targets[rows], words)
                taken = torch.where(inside, logits.gather(-1, column)[:, 0], taken)
                before, greatest = greatest, torch.maximum(greatest, logits.amax(-1))
                shrunk, raised = (before - greatest).exp(), (logits - greatest[:, None]).exp_()
                total = total * shrunk + raised.sum(-1)
                weighted = weighted * shrunk + torch.linalg.vecdot(raised, logits)
            normaliser[rows] = greatest + total.log()
            logprobs[rows] = taken - normaliser[rows]
            entropy[rows] = normaliser[rows] - weighted / total
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.temperature, ctx.product = temperature, product
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        head = _Head(hidden, weight, bias, ctx.temperature, ctx.product)
        of_hidden = torch.zeros_like(hidden, dtype=head.wide)
        of_weight = torch.zeros_like(weight, dtype=head.wide) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=head.wide) if bias is not None and ctx.needs_input_grad[2] else None
        scale = (outer / ctx.temperature).to(head.wide)
        for words in head.words:
            for rows in head.rows:
                of_logits = head.logits(rows, words).sub_(normaliser[rows, None]).exp_().mul_(-scale[rows, None])
                inside, column = _within(targets[rows], words)
                of_logits.scatter_add_(-1, column, (scale[rows] * inside)[:, None])
                if of_bias is not None:
                    of_bias[words] += of_logits.sum(0)
                narrow = of_logits.to(ctx.product)
                of_hidden[rows] += narrow @ head.weight[words]
                if of_weight is not None:
                    of_weight[words] += narrow.T @ head.hidden[rows]
        return (
            of_hidden.to(hidden.dtype),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _slices(length: int, most: int) -> list[slice]:
    return [slice(i, min(i + most, length)) for i in range(0, length, most)]


def _within(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Whose target is one of these words, [tokens], and the column of the tile to look at, [tokens, 1]."""
    inside = (targets >= words.start) & (targets < words.stop)
    return inside, (targets - words.start).clamp(0, words.stop - words.start - 1)[:, None]


class _Head:
    """The head's matrix and what it is applied to, in the type that products are taken in."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, product: torch.dtype
    ) -> None:
        self.hidden, self.weight = hidden.to(product), weight.to(product)
        self.bias = None if bias is None else bias.to(product)
        self.temperature = temperature
        self.wide = torch.promote_types(product, torch.float32)
        most_words = min(len(weight), TILE_WORDS)
        self.words, self.rows = _slices(len(weight), most_words), _slices(len(hidden), TILE_ELEMENTS // most_words)

    def logits(self, rows: slice, words: slice) -> Tensor:
        """A tile [tokens, words] over the temperature."""
        bias = None if self.bias is None else self.bias[words]
        logits = linear(self.hidden[rows], self.weight[words], bias).to(self.wide)
        if isinstance(self.temperature, Tensor):
            return logits.div_(self.temperature[rows, None].to(self.wide))
        return logits if self.temperature == 1 else logits.div_(self.temperature)
