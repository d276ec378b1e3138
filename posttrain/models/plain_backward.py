"""The gradient of a plain layer, computed by hand.

`posttrain.models.plain_layer` has the layer itself. Products of weights are added up over tiles of tokens; a frozen weight has none, and a
low-rank adapter's two products replace that of its weight.

Example:
    >>> tiles(2 * TILE_TOKENS + 1)
    [slice(0, 2049, None), slice(2049, 4098, None)]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.models.fused import rotate_back
from posttrain.models.head_rows import HeadLayout, attend_backward
from posttrain.models.plain_weights import (
    DOWN,
    GATE,
    KEY,
    NORM,
    OUT,
    PLACES,
    QUERY,
    QUERY_BIAS,
    QUERY_NORM,
    SECOND_NORM,
    UP,
    VALUE,
    WEIGHTS,
)  # fmt: skip

TILE_TOKENS = 2048
"""About the tokens for which the second half of a layer is computed at a time, so that its tensors stay in the processor's cache."""


class LayerShape(NamedTuple):
    """Sizes and constants of a layer."""

    heads: int
    key_heads: int
    size: int
    scaling: float
    epsilons: tuple[float, float, float]
    """Of the norms before attention, of heads, and before the feed-forward network."""
    rotates: bool
    scalings: tuple[float, ...]
    """Of the adapters of linear modules, by the places of their weights."""


class LayerInputs(NamedTuple):
    """A layer's shape, the layout of its attention, the tokens that are read, and cosines and sines [tokens, 1, size]."""

    shape: LayerShape
    layout: HeadLayout
    reads: Tensor | None
    cos: Tensor
    sin: Tensor
    returns_reads: bool = False
    """If True, the layer returns only the tokens that are read, [read, hidden]."""


def tiles(tokens: int) -> list[slice]:
    """Return equal parts of the tokens, each of about `TILE_TOKENS`."""
    size = -(-tokens // max(1, round(tokens / TILE_TOKENS))) or 1
    return [slice(start, start + size) for start in range(0, max(tokens, 1), size)]


def angles_of(inputs: LayerInputs, of_reads: bool) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [tokens, 1, size] of all tokens, or of those that are read."""
    if inputs.reads is None or not of_reads:
        return inputs.cos, inputs.sin
    return inputs.cos.index_select(0, inputs.reads), inputs.sin.index_select(0, inputs.reads)


class Gradient:
    """The gradient of one layer.

    Args:
        needs: which inputs of the layer's autograd function need a gradient: states, the inputs, and each weight.
    """

    def __init__(self, inputs: LayerInputs, weights: Any, needs: tuple[bool, ...]) -> None:
        self.inputs, self.weights = inputs, weights
        self.needs_states, self.needs = needs[0], needs[2:]
        self.found: list[Tensor | None] = [None] * WEIGHTS

    def __call__(self, gradient: Tensor, kept: list[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the states [tokens, hidden] and of the weights."""
        reads, tokens = self.inputs.reads, len(kept[0])
        if reads is not None and not self.inputs.returns_reads:
            gradient = gradient.index_select(0, reads)
        of_middle, of_mixed = self._second_half(gradient, kept)
        of_states = self._attention(of_middle, of_mixed, tokens, kept)
        if not self.needs_states:
            return None, self.found
        if reads is not None:
            of_states = of_states.index_add_(0, reads, of_middle)
        return of_states, self.found

    def _second_half(self, gradient: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the gradients of the states behind attention, and of its outputs with a row of zeros at the end."""
        shape, tokens = self.inputs.shape, len(gradient)
        of_middle, of_mixed = torch.empty_like(gradient), gradient.new_empty(tokens * shape.heads + 1, shape.size)
        of_mixed[-1] = 0
        flat = of_mixed[:-1].view(tokens, -1)
        for rows in reversed(tiles(tokens)):
            passed, lifted, opened, mixed, scale, normal = (kept.pop() for _ in range(6))
            own = self._feed_forward(gradient[rows], normal, scale, (opened, lifted, passed), of_middle[rows])
            self._linear(OUT, own, mixed, flat[rows])
        return of_middle, of_mixed

    def _feed_forward(
        self, gradient: Tensor, normal: Tensor, scale: Tensor, inner: tuple[Tensor, Tensor, Tensor], out: Tensor
    ) -> Tensor:
        """Return in `out` the gradient of the states between attention and the feed-forward network."""
        opened, lifted, passed = inner
        of_gated = self._linear(DOWN, gradient, passed * lifted if self._trains(DOWN) else None)
        of_lifted = of_gated * passed
        of_opened = torch.ops.aten.silu_backward.grad_input(of_gated.mul_(lifted), opened, grad_input=of_gated)
        given = normal * self.weights[SECOND_NORM] if self._trains(GATE, UP) else None
        of_given = self._linear(GATE, of_opened, given)
        self._linear(UP, of_lifted, given, of_given, adds=True)
        return torch.addcmul(gradient, self._unit(SECOND_NORM, of_given, normal), scale, out=out)

    def _attention(self, gradient: Tensor, of_mixed: Tensor, tokens: int, kept: list[Tensor]) -> Tensor:
        """Return the gradient of the layer's states. For a layer that computes only some tokens, it lacks that of the residual."""
        (normal, scale), shape, reads = kept[:2], self.inputs.shape, self.inputs.reads
        norms = [kept[2 * n : 2 * n + 2] if self.weights[QUERY_NORM - 1 + n] is not None else [] for n in (1, 2)]
        query, key, value = attend_backward(of_mixed, tokens, self.inputs.layout, kept[2 + sum(map(len, norms)) :])
        query = self._rotated(query.view(len(gradient), -1, shape.size), 0, norms[0])
        key = self._rotated(key.view(tokens, -1, shape.size), 1, norms[1])
        given = normal * self.weights[NORM] if self._trains(QUERY, KEY, VALUE) else None
        value = value.view(tokens, -1)
        of_given = self._linear(KEY, key, given)
        self._linear(VALUE, value, given, of_given, adds=True)
        for place, found in enumerate((query, key, value), QUERY_BIAS):
            if self.needs[place]:
                self.found[place] = found.sum(0)
        if reads is None:
            self._linear(QUERY, query, given, of_given, adds=True)
            return torch.addcmul(gradient, self._unit(NORM, of_given, normal), scale)
        own = None if given is None else given.index_select(0, reads)
        of_given.index_add_(0, reads, self._linear(QUERY, query, own))
        return self._unit(NORM, of_given, normal).mul_(scale)

    def _rotated(self, gradient: Tensor, number: int, norm: list[Tensor]) -> Tensor:
        """Return the gradient of the products of queries (0) or keys (1), [tokens, heads x size]."""
        shape = self.inputs.shape
        back = rotate_back(gradient, *angles_of(self.inputs, number == 0)) if shape.rotates else gradient
        if number == 0:
            back.mul_(shape.scaling)
        if norm:
            normal, scale = norm
            back = self._unit(QUERY_NORM + number, back, normal).mul_(scale)
        return back.view(len(back), -1)

    def _trains(self, *places: int) -> bool:
        """Return True if the weight of a linear module or its adapter needs a gradient."""
        return any(self.needs[place] or any(self.needs[PLACES[place] : PLACES[place] + 2]) for place in places)

    def _linear(
        self, place: int, gradient: Tensor, given: Tensor | None, out: Tensor | None = None, adds: bool = False
    ) -> Tensor:
        """Return the gradient of a linear module's input, in `out` if there is one, and add up those of its weight and adapter.

        Args:
            given: the module's input, which only a module that trains needs.
            adds: add to `out`.
        """
        weight, scaling = self.weights[place], self.inputs.shape.scalings[place]
        self._add(place, gradient, given)
        found = out.addmm_(gradient, weight) if adds and out is not None else torch.mm(gradient, weight, out=out)
        a, b = self.weights[PLACES[place] : PLACES[place] + 2]
        if a is not None:
            of_low = torch.mm(gradient, b).mul_(scaling)
            self._add(PLACES[place], of_low, given)
            self._add(PLACES[place] + 1, gradient, None if given is None else torch.mm(given, a.t()).mul_(scaling))
            found.addmm_(of_low, a)
        return found

    def _add(self, place: int, gradient: Tensor, given: Tensor | None) -> None:
        """Add a product to the gradient of a matrix that needs one."""
        if self.needs[place] and given is not None:
            found = self.found[place]
            self.found[place] = gradient.t() @ given if found is None else found.addmm_(gradient.t(), given)

    def _unit(self, number: int, gradient: Tensor, normal: Tensor) -> Tensor:
        """Return the gradient dy of weighted normal states n w as w dy - n mean(n w dy), in place; the factor of the norm is left out."""
        weight, size = self.weights[number], gradient.shape[-1]
        products = gradient * normal
        if self.needs[number]:
            total, found = products.flatten(0, -2).sum(0), self.found[number]
            self.found[number] = total if found is None else found.add_(total)
        mean = (products @ weight)[..., None]
        return gradient.mul_(weight).addcmul_(normal, mean, value=-1 / size)
