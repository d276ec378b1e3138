"""Log-probabilities and entropy of selected tokens, fused with the language model's head: no [tokens, vocabulary] tensor ever exists.

The softmax is computed online over tiles of tokens x vocabulary that stay in the processor's cache. This is the scheme of Cut
Cross-Entropy (2411.09009), which keeps the tiles in GPU shared memory. The backward pass computes each tile again from the saved
normaliser log sum exp, so that each part of the head's gradient is written once. On a GPU a trial chooses the functions for a tile
(posttrain/models/head_trial.py): single operators, or kernels that read it once.

A small vocabulary fits into one tile of words on a CPU. Then there is no running softmax, and the probabilities are kept for the backward
pass if they are few.

Example:
    A head of zeros over 4 words gives each of them probability 1/4:

    >>> import math, torch
    >>> logprobs, entropy = selected_logprobs(torch.ones(1, 2), torch.zeros(4, 2), None, torch.tensor([3]), temperature=1.0)
    >>> math.isclose(float(logprobs), -math.log(4), rel_tol=1e-6), math.isclose(float(entropy), math.log(4), rel_tol=1e-6)
    (True, True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from posttrain.models.head_tiles import RowGradients, Sums, TileWork, add_product, tempered
from posttrain.models.head_trial import tile_work

TILE_ELEMENTS, TILE_WORDS = 2**21, 4096
"""Most logits of a tile on a CPU (8 MiB of float32), and most words of the vocabulary in a tile, which stays in cache."""
ROW_ELEMENTS, KEPT_ELEMENTS = 2**18, 2**22
"""Most logits of a tile with all words of a small vocabulary on a CPU (1 MiB), and most probabilities kept (16 MiB)."""
DEVICE_TILE_ELEMENTS, DEVICE_TILE_WORDS = 2**27, 2**14
"""Most logits of a tile on a GPU (512 MiB of float32), and its words if there are as many tokens as the rest allows.

Single operators start about 25 kernels a tile, so tiles are as large as memory allows. Neither side is short, because a tile adds to the
gradients of all its words and of all its tokens, in float32."""


def tile_elements(kind: str) -> int:
    """Return the most logits of a tile on a kind of device: `cpu`, `cuda`."""
    return TILE_ELEMENTS if kind == "cpu" else DEVICE_TILE_ELEMENTS


def tile_words(kind: str, tokens: int, vocabulary: int) -> int:
    """Return the words of a tile, given all tokens.

    Example:
        8,192 tokens of a GPU take all of a tile's rows; fewer leave room for more words:

        >>> tile_words("cuda", 8192, 151_936), tile_words("cuda", 2048, 151_936), tile_words("cpu", 2048, 151_936)
        (16384, 65536, 4096)
    """
    if kind == "cpu":
        return min(vocabulary, TILE_WORDS)
    return min(vocabulary, max(DEVICE_TILE_WORDS, DEVICE_TILE_ELEMENTS // max(1, tokens)))


def selected_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return (log p(target), entropy in nats), both [tokens] float32, of softmax(hidden @ weight.T / temperature).

    The head's product is selected in autocast's dtype, the softmax in float32 or wider. Both carry gradients.

    Args:
        hidden: [tokens, hidden].
        weight: [vocabulary, hidden].
        bias: [vocabulary] or None.
        targets: [tokens] ids.
        temperature: one number, or [tokens].
    """
    kind = hidden.device.type
    product = product_dtype(kind, weight)
    if kind == "cpu" and len(weight) <= TILE_WORDS:
        logprobs, entropy = _OfWholeRows.apply(hidden, weight, bias, targets, temperature, product)
    else:
        work = tile_work(hidden, weight, product)
        logprobs, entropy = _SelectedLogprobs.apply(hidden, weight, bias, targets, temperature, product, work)
    return logprobs, entropy


def product_dtype(kind: str, weight: Tensor) -> torch.dtype:
    """Return the dtype of the head's product on a kind of device: autocast's, or that of the head's matrix."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _OfWholeRows(torch.autograd.Function):
    """Autograd function for tiles that hold all words: the same derivatives as `_SelectedLogprobs`."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        product: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, bias, temperature, product, ROW_ELEMENTS)
        words, kept = slice(0, len(weight)), list[Tensor]()
        keeps = len(hidden) * len(weight) <= KEPT_ELEMENTS
        logprobs, entropy = (torch.empty(len(hidden), dtype=head.wide) for _ in range(2))
        for rows in head.rows:
            every = head.logits(rows, words).log_softmax(-1)
            logprobs[rows] = every.gather(-1, targets[rows, None])[:, 0]
            probabilities = every.exp()
            entropy[rows] = torch.linalg.vecdot(probabilities, every).neg_()
            kept += [probabilities] if keeps else []
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, *kept)
        ctx.temperature, ctx.product = temperature, product
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, *kept = ctx.saved_tensors
        head, words = _Head(hidden, weight, bias, ctx.temperature, ctx.product, ROW_ELEMENTS), slice(0, len(weight))
        gradients = _HeadGradients(ctx, head, hidden, weight, bias)
        scale, bonus = _scales(grad_logprobs, grad_entropy, ctx.temperature, entropy)
        for number, rows in enumerate(head.rows):
            probabilities = kept[number] if kept else head.logits(rows, words).softmax(-1)
            factor = -scale[rows, None]
            if bonus is not None:
                # p log p is 0 at p = 0
                found = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
                factor = factor - bonus[rows, None] * (found + entropy[rows, None])
            # [tokens, words]: scale * (onehot - p)
            grad_logits = probabilities * factor
            grad_logits.scatter_add_(-1, targets[rows, None], scale[rows, None])
            gradients.add(grad_logits, rows, words)
        return gradients.of_inputs()


class _SelectedLogprobs(torch.autograd.Function):
    """Autograd function: d log p(y) / d logits = onehot(y) - p and dH / d logits = -p (log p + H), tile by tile."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        product: torch.dtype,
        work: TileWork,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, bias, temperature, product)
        logprobs, entropy, normaliser = (
            torch.empty(len(hidden), dtype=head.wide, device=hidden.device) for _ in range(3)
        )
        # rows outside, words inside: the running softmax of a row needs all of the vocabulary before it is complete
        for rows in head.rows:
            sums = Sums.start(len(targets[rows]), normaliser)
            for words in head.words:
                work.scan(head.product_of(rows, words), targets[rows] - words.start, head.temperature_of(rows), sums)
            normaliser[rows], entropy[rows] = sums.normaliser(), sums.entropy()
            logprobs[rows] = sums.selected - normaliser[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.temperature, ctx.product, ctx.work = temperature, product, work
        # an output that no loss uses has gradient None, so an entropy that is only reported costs nothing
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        work, head = ctx.work, _Head(hidden, weight, bias, ctx.temperature, ctx.product)
        gradients = _HeadGradients(ctx, head, hidden, weight, bias, work.add_product)
        of_rows = RowGradients(normaliser, entropy, *_scales(grad_logprobs, grad_entropy, ctx.temperature, entropy))
        # words outside, rows inside: a slice of the head's gradient stays in cache until all rows have been added to it
        for words in head.words:
            for rows in head.rows:
                tile, columns = head.product_of(rows, words), targets[rows] - words.start
                gradients.add(
                    work.differentiate(tile, columns, head.temperature_of(rows), of_rows.at(rows)), rows, words
                )
        return *gradients.of_inputs(), None


def _scales(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, temperature: float | Tensor, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of log-probabilities and entropy, both [tokens], with respect to logits before the temperature."""
    scale = torch.zeros_like(like) if grad_logprobs is None else (grad_logprobs / temperature).to(like.dtype)
    return scale, None if grad_entropy is None else (grad_entropy / temperature).to(like.dtype)


class _HeadGradients:
    """The gradients of the head's input, matrix and bias, summed over tiles."""

    def __init__(
        self,
        ctx: Any,
        head: _Head,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        add_product: Callable[[Tensor, Tensor, Tensor], None] = add_product,
    ) -> None:
        self.add_product = add_product
        self.head, self.dtypes = head, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self.hidden = torch.zeros_like(hidden, dtype=head.wide)
        self.weight = torch.zeros_like(weight, dtype=head.wide) if ctx.needs_input_grad[1] else None
        self.bias = torch.zeros_like(bias, dtype=head.wide) if bias is not None and ctx.needs_input_grad[2] else None

    def add(self, grad_logits: Tensor, rows: slice, words: slice) -> None:
        """Add the gradients of one tile of logits [tokens, words]."""
        head = self.head
        if self.bias is not None:
            self.bias[words] += grad_logits.sum(0, dtype=head.wide)
        # single operators return float32, so the bias is summed before the products round to autocast's dtype
        narrow = grad_logits.to(head.product)
        self.add_product(self.hidden[rows], narrow, head.weight[words])
        if self.weight is not None:
            self.add_product(self.weight[words], narrow.T, head.hidden[rows])

    def of_inputs(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs, in the dtypes of the inputs."""
        sums = (self.hidden, self.weight, self.bias)
        cast = [None if each is None else each.to(dtype) for each, dtype in zip(sums, self.dtypes, strict=True)]
        return *cast, None, None, None


def _slices(length: int, most: int) -> list[slice]:
    return [slice(i, min(i + most, length)) for i in range(0, length, most)]


class _Head:
    """The head's matrix and its input, in the dtype of the matrix products."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float | Tensor,
        product: torch.dtype,
        most_elements: int | None = None,
    ) -> None:
        self.product = product
        self.hidden, self.weight = hidden.to(product), weight.to(product)
        self.bias = None if bias is None else bias.to(product)
        self.temperature = temperature
        self.wide = torch.promote_types(product, torch.float32)
        kind, tokens = hidden.device.type, len(hidden)
        words = tile_words(kind, tokens, len(weight))
        most_rows = max(1, (most_elements or tile_elements(kind)) // words)
        self.words, self.rows = _slices(len(weight), words), _slices(tokens, most_rows)

    def product_of(self, rows: slice, words: slice) -> Tensor:
        """Return one tile of the product [tokens, words], in the product's dtype, before the temperature."""
        bias = None if self.bias is None else self.bias[words]
        return linear(self.hidden[rows], self.weight[words], bias)

    def temperature_of(self, rows: slice) -> float | Tensor:
        """Return the temperature of some rows: one number, or one for each."""
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature

    def logits(self, rows: slice, words: slice) -> Tensor:
        """Return one tile of logits [tokens, words], divided by the temperature."""
        return tempered(self.product_of(rows, words), self.temperature_of(rows))
