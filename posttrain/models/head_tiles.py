"""The work on one tile of logits [tokens, words], in single operators: sums of an online softmax, and the gradient of the logits.

A GPU has kernels that do the same in one pass over the tile (posttrain/models/head_kernels.py).

Example:
    Two equal logits in two tiles of one word: log Z = log 2, and the entropy is log 2.

    >>> import math, torch
    >>> sums = Sums.start(1, torch.zeros(1))
    >>> for column in (0, -1):  # the target is the first word, so it is left of the second tile
    ...     scan(torch.zeros(1, 1), torch.tensor([column]), 1.0, sums)
    >>> math.isclose(float(sums.normaliser()), math.log(2), rel_tol=1e-6)
    True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """Sums of the rows' softmax after some tiles of words: all [tokens], float32 or wider.

    Attributes:
        selected: the target's logit z; 0 before its tile.
        greatest: the largest logit m.
        total: sum of exp(z - m).
        weighted: sum of z exp(z - m).
    """

    selected: Tensor
    greatest: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def start(cls, rows: int, like: Tensor) -> Sums:
        """Return the sums of no words, of the dtype and on the device of `like`."""
        selected, total, weighted = like.new_zeros(3, rows)
        return cls(selected, like.new_full((rows,), -torch.inf), total, weighted)

    def normaliser(self) -> Tensor:
        """Return log sum exp(z), [tokens]."""
        return self.greatest + self.total.log()

    def entropy(self) -> Tensor:
        """Return H = log Z - E[z], [tokens], which follows from -sum p log p with log p = z - log Z."""
        return self.normaliser() - self.weighted / self.total


class RowGradients(NamedTuple):
    """Values that the gradient of a row's logits needs: all [tokens], float32 or wider.

    Attributes:
        normaliser: log sum exp of the row's logits.
        entropy: entropy of the row.
        scale: gradient of the log-probability, divided by the temperature.
        bonus: gradient of the entropy, divided by the temperature; None without one.
    """

    normaliser: Tensor
    entropy: Tensor
    scale: Tensor
    bonus: Tensor | None

    def at(self, rows: slice) -> RowGradients:
        """Return the values of some rows."""
        bonus = None if self.bonus is None else self.bonus[rows]
        return RowGradients(self.normaliser[rows], self.entropy[rows], self.scale[rows], bonus)


class TileWork(NamedTuple):
    """Functions that compute a tile. Both may overwrite the product.

    Attributes:
        scan: adds a tile to the sums, given the product, the targets' columns in the tile, the temperature, and the sums.
        differentiate: returns the gradient of the product's numbers, given product, columns, temperature and rows.
        add_product: adds the matrix product of the second and third tensor to the first one, which is wider or of the same dtype.
    """

    scan: Callable[[Tensor, Tensor, float | Tensor, Sums], None]
    differentiate: Callable[[Tensor, Tensor, float | Tensor, RowGradients], Tensor]
    add_product: Callable[[Tensor, Tensor, Tensor], None]


def tempered(product: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the product divided by the temperature (one number or [tokens]), in float32 or wider; in place if it is wide."""
    logits = product.to(torch.promote_types(product.dtype, torch.float32))
    if isinstance(temperature, Tensor):
        return logits.div_(temperature[:, None].to(logits.dtype))
    return logits if temperature == 1 else logits.div_(temperature)


def scan(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    """Add the words of a tile to the sums. A column outside of the tile is a target in a different one."""
    logits = tempered(product, temperature)
    inside, column = _within(columns, logits.shape[1])
    # the column is clamped for targets outside this tile, so `where` discards these logits
    sums.selected.copy_(torch.where(inside, logits.gather(-1, column)[:, 0], sums.selected))
    greatest = torch.maximum(sums.greatest, logits.amax(-1))
    # when the maximum rises, both sums are scaled down to it (online softmax, 1805.02867)
    # as long as all logits are -inf, exp(-inf - 0) is 0 and exp(-inf - -inf) would be NaN
    base = greatest.masked_fill(greatest == -torch.inf, 0)
    rescale, exponentials = (sums.greatest - base).exp(), (logits - base[:, None]).exp_()
    sums.greatest.copy_(greatest)
    sums.total.mul_(rescale).add_(exponentials.sum(-1))
    sums.weighted.mul_(rescale).add_(torch.linalg.vecdot(exponentials, logits))


def differentiate(product: Tensor, columns: Tensor, temperature: float | Tensor, rows: RowGradients) -> Tensor:
    """Return scale (onehot - p) - bonus p (log p + H), [tokens, words]."""
    gradient = tempered(product, temperature).sub_(rows.normaliser[:, None])
    if rows.bonus is None:
        gradient.exp_().mul_(-rows.scale[:, None])
    else:
        factor = rows.scale[:, None] + rows.bonus[:, None] * (gradient + rows.entropy[:, None])
        gradient.exp_().mul_(-factor)
    inside, column = _within(columns, gradient.shape[1])
    return gradient.scatter_add_(-1, column, (rows.scale * inside)[:, None])


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right`; if they are narrower than the total, the product is rounded to their dtype first."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _within(columns: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Return which columns are in a tile of so many words, [tokens] bool, and the column to read, [tokens, 1]."""
    return (columns >= 0) & (columns < words), columns.clamp(0, words - 1)[:, None]


SINGLE_OPERATORS = TileWork(scan, differentiate, add_product)
