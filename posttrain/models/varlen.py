"""Attention by offsets with FlashAttention's kernels, and one gradient for responses that share a prompt.

A response's query sees the shared prompt and its own tokens before it. Two calls compute both halves, each with the log-sum-exp of its
scores. With o and l of the halves a and b, the output of the whole row is

    l = log(exp l_a + exp l_b),    o = exp(l_a - l) o_a + exp(l_b - l) o_b.

The backward kernel computes a half's gradient from the probabilities exp(score - l) and the row's sum of (gradient x output). Given the
*merged* l and o, both are those of the whole row, so each half's gradient is exact, and they add up. The kernel's own derivative would
ignore that l_a and l_b depend on the scores.

A sink is a further half: a score s without a value, so l = log(exp l_a + exp s), o = exp(l_a - l) o_a, and the derivative of s is
-exp(s - l) (gradient x output), summed over the queries of its head. In a window there is one call, by keys that include a prompt's end.

Example:
    >>> takes_size(128, 128), takes_size(128, 64), takes_size(12, 12)
    (True, False, False)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.data.offsets import ByOffsets, Offsets
from posttrain.models.flash import use_newest
from posttrain.models.kernels import PLAIN, Scores

GREATEST_SIZE, SIZES = 256, 8
"""FlashAttention computes heads of at most so many numbers, a multiple of SIZES."""


class Kernel(NamedTuple):
    """The forward and backward functions of a kernel, with the signatures of `torch_attn::_varlen_attn` since PyTorch 2.11."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@cache
def _flash() -> Kernel:
    # it registers the operators, and takes a second because it imports the compiler
    import torch.nn.attention.varlen

    use_newest()
    return Kernel(torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward)


KERNELS: dict[str, Callable[[], Kernel]] = {"cuda": _flash}
"""The kernel of each kind of device; posttrain/data/offsets.py lists the same devices with the dtypes."""


def takes_size(size: int, value_size: int) -> bool:
    """Return True if the kernel computes heads of this size."""
    return size <= GREATEST_SIZE and size % SIZES == 0 and value_size == size


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: ByOffsets, scores: Scores = PLAIN) -> Tensor:
    """Return the outputs [queries, heads, size] of the layout's queries, in the order of `layout.own.queries`.

    Args:
        query: [tokens, heads, size].
        key: [tokens, key heads, size]; each key head serves heads / key heads query heads.
        value: the shape of `key`.
        scores: without a soft cap, which the kernel does not compute.
    """
    layout = layout.within(scores.window)
    calls = [layout.own, *([] if layout.shared is None else [layout.shared])]
    tensors = [tensor for call in calls for tensor in call.tensors()]
    outputs: Tensor = _Merged.apply(query, key, value, scores.sinks, layout, scores.scaling, *tensors)
    return outputs


class _Merged(torch.autograd.Function):
    """Attention over own keys, merged with attention over a shared prompt and with sinks."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layout: ByOffsets,
        scaling: float | None,
        *__: Tensor,
    ) -> Tensor:
        own, shared = layout.own, layout.shared
        states = _taken(query, key, value, own, layout.in_order)
        output, normaliser, state = _forward(states, own, _window(True, layout), scaling)
        if shared is not None:
            over_prompt = (states[0].index_select(0, shared.queries), *_keys(key, value, shared))
            there, its_normaliser, _ = _forward(over_prompt, shared, _window(False), scaling)
            output, normaliser = _merge(output, normaliser, there, its_normaliser, shared.queries)
        if sinks is not None:
            output, normaliser = _merge_sinks(output, normaliser, sinks)
        ctx.save_for_backward(query, key, value, output, normaliser, state, sinks)
        ctx.layout, ctx.scaling = layout, scaling
        return output

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normaliser, state, sinks = ctx.saved_tensors
        own, shared, in_order = ctx.layout.own, ctx.layout.shared, ctx.layout.in_order
        gradient = gradient.contiguous()
        states = _taken(query, key, value, own, in_order)
        found = _backward(gradient, states, (output, normaliser, state), own, _window(True, ctx.layout), ctx.scaling)
        if not in_order:
            indices = (own.queries, own.keys, own.keys)
            found = [
                _spread(part, index, like)
                for part, index, like in zip(found, indices, (query, key, value), strict=True)
            ]
        if shared is not None:
            at = shared.queries
            over_prompt = (states[0].index_select(0, at), *_keys(key, value, shared))
            merged = output.index_select(0, at), normaliser.index_select(1, at), state
            more = _backward(gradient.index_select(0, at), over_prompt, merged, shared, _window(False), ctx.scaling)
            tokens = at if in_order else own.queries.index_select(0, at)
            for part, added, index in zip(found, more, (tokens, shared.keys, shared.keys), strict=True):
                part.index_add_(0, index, added)
        of_sinks = None if sinks is None else _sinks_gradient(gradient, output, normaliser, sinks)
        return *found, of_sinks, None, None, *[None] * (4 if shared is None else 8)


def _taken(query: Tensor, key: Tensor, value: Tensor, call: Offsets, in_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    if in_order:
        return query, key, value
    return query.index_select(0, call.queries), *_keys(key, value, call)


def _keys(key: Tensor, value: Tensor, call: Offsets) -> tuple[Tensor, Tensor]:
    return key.index_select(0, call.keys), value.index_select(0, call.keys)


def _forward(
    states: tuple[Tensor, Tensor, Tensor], call: Offsets, window: list[int], scaling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs [queries, heads, size], their log-sum-exp [heads, queries], and the kernel's state."""
    starts = (call.query_starts, call.key_starts, call.longest_query, call.longest_key)
    # the kernel sees from the shapes that heads are grouped; PyTorch 2.13's argument for it is unknown to older versions
    return KERNELS[states[0].device.type]().forward(*states, *starts, _causal(window), scaling, window)


def _backward(
    gradient: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    merged: tuple[Tensor, Tensor, Tensor],
    call: Offsets,
    window: list[int],
    scaling: float | None,
) -> list[Tensor]:
    """Return the gradients of queries, keys and values of one call, given the outputs and log-sum-exp of whole rows."""
    output, normaliser, state = merged
    starts = (call.query_starts, call.key_starts, call.longest_query, call.longest_key)
    backward = KERNELS[gradient.device.type]().backward
    given = (gradient, *states, output, normaliser.contiguous(), *starts, _causal(window), state, scaling, window)
    return [*backward(*given)]


def _merge(
    output: Tensor, normaliser: Tensor, there: Tensor, its_normaliser: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs and log-sum-exp in which the queries at `at` also see the keys behind `there`."""
    here = normaliser.index_select(1, at)
    both = torch.logaddexp(here, its_normaliser)
    weights = [(part - both).exp().t()[:, :, None] for part in (here, its_normaliser)]
    wide = torch.promote_types(output.dtype, torch.float32)
    mixed = weights[0] * output.index_select(0, at).to(wide) + weights[1] * there.to(wide)
    return output.index_copy(0, at, mixed.to(output.dtype)), normaliser.index_copy(1, at, both)


def _merge_sinks(output: Tensor, normaliser: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and log-sum-exp of rows in which each head's sink [heads] takes part."""
    both = torch.logaddexp(normaliser, sinks.to(normaliser.dtype)[:, None])
    share = (normaliser - both).exp().t()[:, :, None]
    return (output.to(share.dtype) * share).to(output.dtype), both


def _sinks_gradient(gradient: Tensor, output: Tensor, normaliser: Tensor, sinks: Tensor) -> Tensor:
    wide = normaliser.dtype
    # [heads, queries]
    delta = (gradient.to(wide) * output.to(wide)).sum(-1).t()
    return -((sinks.to(wide)[:, None] - normaliser).exp() * delta).sum(1).to(sinks.dtype)


def _spread(part: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=part.dtype).index_add_(0, index, part)


def _window(causal: bool, layout: ByOffsets | None = None) -> list[int]:
    """Return how many tokens a query sees before and after it, in the kernel's spelling: -1 for all."""
    if not causal:
        return [-1, -1]
    return [-1 if layout is None or layout.window is None else layout.window - 1, 0]


def _causal(window: list[int]) -> bool:
    """Return the argument that PyTorch's public function gives with a window."""
    return window == [-1, 0]
